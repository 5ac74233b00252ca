"""Batches run to be timed: how long they take on the device, and how much of its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embedstream.shared.logs import get_logger

from . import allocator
from .faults import Fault, fault_of
from .free_memory import forget_peak, free_bytes, peak_bytes, resident_bytes
from .model import Model

_TIMED_RUNS = 2
_LONG_RUN_S = 0.1
"""What takes so long is no matter of cold caches, and is run once."""
_OWN_PART = 0.6
"""A thread that computes has the processor for nearly all of the time; where others want it too, for less than this."""

log = get_logger()


@dataclass(frozen=True, slots=True)
class Run:
    """A batch of sequences of one length.

    Args:
        length: tokens of each sequence.
        rows: sequences.
        seconds: of the forward pass, above 0.
        peak_bytes: memory that it took beside the weights; 0 where that is not known.
        fits: whether there was enough memory for it; else its time says nothing.

    Raises:
        ValueError: there is no such batch.
    """

    length: int
    rows: int
    seconds: float
    peak_bytes: int = 0
    fits: bool = True

    def __post_init__(self) -> None:
        if not (self.length > 0 and self.rows > 0 and self.seconds > 0 and self.peak_bytes >= 0):
            raise ValueError(f"no batch of {self.rows} sequences of {self.length} tokens takes {self.seconds} s")

    @property
    def tokens(self) -> int:
        """In all."""
        return self.length * self.rows

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens of each sequence."""
        return np.full(self.rows, self.length)


class Runner(Protocol):
    """Runs batches of sequences of one length."""

    @property
    def spent_s(self) -> float:
        """Time of all runs so far."""

    def __call__(self, length: int, rows: int) -> Run:
        """Run it, twice where that is quick, and tell the shorter time."""


class DeviceMemory:
    """Memory of a device: of CUDA as torch's allocator sees it, of a CPU as the kernel counts this process's pages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._before: int | None = None
        self._counts = False  # whether the kernel tells the peak of one batch from those before

    def free_bytes(self) -> int | None:
        """What batches could take; on CUDA also what torch has in hand without using it. None where nobody can tell."""
        if not self._cuda:
            return free_bytes(self._device)
        in_hand = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return (free_bytes(self._device) or 0) + in_hand

    def begin(self) -> None:
        """A batch begins."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        self._counts = forget_peak()
        if self._before is None:
            self._before = resident_bytes()

    def peak_bytes(self) -> int:
        """The most that it has taken at a time; 0 where nobody counts it.

        On a CPU it is counted from the first batch on, for what one leaves is there for the next, which is no smaller.
        """
        of_process = peak_bytes() if self._counts else 0
        peak = torch.cuda.max_memory_allocated(self._device) if self._cuda else of_process
        return max(0, peak - (self._before or 0))

    def release(self) -> None:
        """Give back what batches have left in the hands of torch or of the C library."""
        if self._cuda:
            torch.cuda.empty_cache()
        else:
            allocator.give_back()


class Timer:
    """Runs batches of a model with the adapter of requests that choose none.

    Args:
        model: loaded and warm.
        memory: of its device.
    """

    def __init__(self, model: Model, memory: DeviceMemory | None = None) -> None:
        self.memory = memory or DeviceMemory(model.device)
        self.spent_s = 0.0
        """Time of all runs so far."""
        self._own_s = 0.0
        self._model = model
        self._text = model.tokenizer.encode(["warm up"]).ids

    @property
    def disturbed(self) -> bool:
        """Whether others used the processor so much that the times say little of the device."""
        return self._model.device.type == "cpu" and self._own_s < _OWN_PART * self.spent_s

    def __call__(self, length: int, rows: int) -> Run:
        """See `Runner`.

        Raises:
            Exception: it fails for another reason than its size; or a single row finds too little memory.
        """
        started_s, own_s = time.perf_counter(), time.thread_time()
        self.memory.begin()
        try:
            seconds = self._seconds(length, rows)
        except Exception as error:
            if rows == 1 or fault_of(error) is not Fault.MEMORY:
                raise
            # Batches of requests that are too large are halved; how long those take will be known then.
            log.warning("model.batch_too_large", tokens=rows * length)
            spent_s = time.perf_counter() - started_s
        else:
            log.debug("model.timed", rows=rows, length=length, ms=round(seconds * 1000, 2))
            return Run(length, rows, seconds, self.memory.peak_bytes())
        finally:
            self.spent_s += time.perf_counter() - started_s
            self._own_s += time.thread_time() - own_s
        self.memory.release()
        return Run(length, rows, spent_s, fits=False)

    def _seconds(self, length: int, rows: int) -> float:
        ids, lengths = np.tile(np.resize(self._text, length), rows), np.full(rows, length)
        least_s = float("inf")
        for _ in range(_TIMED_RUNS):  # the first meets cold caches
            started_s = time.perf_counter()
            self._model.forward(ids, lengths, self._model.recipe.default_adapter).sum().item()  # waits for the device
            least_s = min(least_s, time.perf_counter() - started_s)
            if least_s > _LONG_RUN_S and rows > 1:  # a single row predicts the others, and must not do so when cold
                break
        return least_s
