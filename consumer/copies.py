"""Copies between host and device that nobody waits for.

A plain `tensor.to("cuda")` of pageable memory holds the host until the device has done all that was asked of it before,
and `.cpu()` does so as well: the next batch could then only be prepared while the device stands idle. On CUDA arrays
therefore go through pinned memory on a stream of their own, and results come back with an event to wait for. On a CPU
there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

Fetch = Callable[[], Tensor]
"""Waits for a tensor that is on its way to the host, and gives it."""


class Copies(Protocol):
    """Moves arrays to one device, and tensors back."""

    @property
    def overlap(self) -> bool:
        """Whether the host may go on while the device computes; else everything is done when a call returns."""

    def to_device(self, array: NDArray[Any]) -> Tensor:
        """Bring an array to the device.

        Args:
            array: any shape, of a type that torch has. It may be changed once this returns, but where there is nothing
                to copy: there the tensor shares its memory.

        Returns:
            A tensor of the same shape and type, to be used on the current stream.
        """

    def to_host(self, tensor: Tensor) -> Fetch:
        """Bring a tensor to the host.

        Args:
            tensor: computed on the current stream, and not changed any more.

        Returns:
            What waits for it.
        """


class Direct:
    """Copies that are done at once; on a CPU none are.

    Args:
        device: any.
    """

    overlap = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_device(self, array: NDArray[Any]) -> Tensor:
        """See `Copies`."""
        return torch.from_numpy(array).to(self._device)

    def to_host(self, tensor: Tensor) -> Fetch:
        """See `Copies`."""
        there = tensor.cpu()
        return lambda: there


class Stream(Protocol):
    """A queue of work for a device, as `torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None:
        """Let what is put in from now on wait for what is in another one now."""


class Event(Protocol):
    """A mark in a stream, as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class Runtime(Protocol):
    """What is used of `torch.cuda`, so that it can be told apart from the order in which it is used."""

    def new_stream(self) -> Stream:
        """A stream of its own."""

    def current_stream(self) -> Stream:
        """The stream that kernels of this thread go to."""

    def within(self, stream: Any) -> AbstractContextManager[Any]:
        """Let kernels and copies of this thread go to a stream."""

    def mark(self, stream: Any) -> Event:
        """An event at the end of a stream."""

    def pinned(self, like: Tensor) -> Tensor:
        """Host memory that the device reads and writes by itself, of the shape and type of a tensor."""

    def to_device(self, pinned: Tensor) -> Tensor:
        """Begin a copy on the current stream."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Not to give a tensor's memory out again before what a stream does with it now is done."""


class PinnedCopies:
    """Copies through pinned memory, a stream for each direction.

    The buffers rotate by themselves: torch gives a pinned block out again only when the copy that uses it has ended, so
    there are two of each size while one batch computes and the next one is prepared.

    Args:
        runtime: of the device.
    """

    overlap = True

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._there = runtime.new_stream()
        self._back = runtime.new_stream()

    def to_device(self, array: NDArray[Any]) -> Tensor:
        """See `Copies`."""
        runtime, source = self._runtime, torch.from_numpy(array)
        pinned = runtime.pinned(source)
        pinned.copy_(source)
        with runtime.within(self._there):  # beside the kernels of the batch before, not behind them
            tensor = runtime.to_device(pinned)
        current = runtime.current_stream()
        current.wait_stream(self._there)
        runtime.keep(tensor, current)  # it was allocated on the other stream, which would reuse it at once
        return tensor

    def to_host(self, tensor: Tensor) -> Fetch:
        """See `Copies`."""
        runtime = self._runtime
        pinned = runtime.pinned(tensor)
        self._back.wait_stream(runtime.current_stream())
        with runtime.within(self._back):  # the next batch need not wait for this one's way back
            pinned.copy_(tensor, non_blocking=True)
        runtime.keep(tensor, self._back)
        arrived = runtime.mark(self._back)

        def fetch() -> Tensor:
            arrived.synchronize()
            return pinned

        return fetch


class Cuda:
    """The runtime of one CUDA device.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> Stream:
        """See `Runtime`."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch gives no types here

    def current_stream(self) -> Stream:
        """See `Runtime`."""
        return torch.cuda.current_stream(self._device)

    def within(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """See `Runtime`."""
        return torch.cuda.stream(stream)

    def mark(self, stream: torch.cuda.Stream) -> Event:
        """See `Runtime`."""
        # Blocking: a thread that waits by spinning would hold the interpreter's core, which the event loop needs.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # as above
        event.record(stream)
        return event

    def pinned(self, like: Tensor) -> Tensor:
        """See `Runtime`."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def to_device(self, pinned: Tensor) -> Tensor:
        """See `Runtime`."""
        return pinned.to(self._device, non_blocking=True)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """See `Runtime`."""
        tensor.record_stream(stream)


@cache
def copies_of(device: torch.device) -> Copies:
    """How arrays get to a device and back; the same object for the same device."""
    return PinnedCopies(Cuda(device)) if device.type == "cuda" else Direct(device)
