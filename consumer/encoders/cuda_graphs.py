"""Small batches on CUDA by graphs: all kernels of a forward pass are launched by one call.

A query of a dozen tokens keeps a GPU busy for less time than it takes to launch some hundred kernels for it one by one.
Graphs have fixed shapes, so there is one for each of a few sizes, captured before the consumer serves, and a batch is
filled up to the next size by sequences that nobody asked for. Attention stays within each sequence, so they change no
other one's numbers; they cost what the device would idle away.

Source: Ng & Paszke et al., "Accelerating PyTorch with CUDA Graphs", pytorch.org, 2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.consumer.copies import Copies, copies_of
from embedstream.consumer.faults import Fault, fault_of
from embedstream.shared.logs import get_logger

from .encoder import Encoder, Ids
from .layout import Group, Layout

log = get_logger()

LEAST_TOKENS = 16
"""Of the smallest size; each of the others is twice the one before."""
_TOKENS_OF_ROW = 4
"""A size has room for one sequence in so many of its tokens, and for one that fills it up."""
_GROWTH = 2
"""With the next size all graphs together take so many times the memory at most: they share it, and it has twice the
tokens."""
_WARM_UPS = 3
"""Passes before a capture: libraries set themselves up in the first ones, which no graph may hold."""
_ERROR = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By how much a graph's numbers may differ from those of the same kernels in another shape, relative to the largest."""


class CannotCaptureError(Exception):
    """The pass depends on the lengths of its sequences in a way that a graph cannot follow."""


@runtime_checkable
class Packable(Encoder, Protocol):
    """An encoder whose work on the device is a function of tensors and of where sequences begin."""

    def tokens(self, ids: Ids, layout: Layout) -> NDArray[np.int64]:
        """Of a batch as it came: (columns, total) what `run` takes, in packed order."""

    def run(self, tokens: Tensor, layout: Layout) -> Tensor:
        """From (columns, total) to (total, dim), in packed order, without waiting for the device."""


class Capturing(Protocol):
    """What is used of CUDA's graphs."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record what a function launches.

        Returns:
            What launches it all again, and the tensor that then holds its result.

        Raises:
            RuntimeError: it waits for the device, or finds too little memory.
        """

    def used_bytes(self) -> int:
        """Memory of the device that this process holds."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is captured.

    Args:
        tokens: of the largest size; none are captured below `LEAST_TOKENS`.
        memory_bytes: of the device, for all graphs; none is captured beyond it.
        max_length: most tokens of a sequence.
    """

    tokens: int
    memory_bytes: int
    max_length: int

    @property
    def sizes(self) -> list[int]:
        """Tokens of each size, ascending."""
        sizes = []
        size = LEAST_TOKENS
        while size <= self.tokens:
            sizes.append(size)
            size *= 2
        return sizes


class _AnyLengths(Layout):
    """Sequences that fill a size, in lengths that are known only to the device, where they may change.

    Args:
        size: tokens.
        cumulative: (rows + 1,) int32 where each begins, and the end of the last one.
        max_length: most tokens of one of them.
    """

    def __init__(self, size: int, cumulative: Tensor, max_length: int) -> None:
        super().__init__(np.array([size]))
        self.max_length = max_length
        self._cumulative = cumulative

    def cumulative(self, device: torch.device) -> Tensor:
        """See `Layout`."""
        if device != self._cumulative.device:
            raise CannotCaptureError(f"lengths are asked for on {device}")
        return self._cumulative

    @property
    def groups(self) -> tuple[Group, ...]:
        """There are none that hold for all batches."""
        raise CannotCaptureError("no attention kernel here takes the lengths of sequences")


@dataclass(frozen=True, slots=True)
class _Graph:
    """One size, captured. Its tensors are read by each replay, or written.

    Args:
        size: tokens.
        rows: most sequences.
        tokens: (columns, size).
        cumulative: (rows + 1,) int32.
        replay: launches everything.
        hidden: (size, dim) in packed order.
    """

    size: int
    rows: int
    tokens: Tensor
    cumulative: Tensor
    replay: Callable[[], None]
    hidden: Tensor


class Graphed:
    """An encoder that runs small batches by graphs, and others as it did.

    Args:
        encoder: in the trial it has shown that it computes what the model does.
        bounds: of what is captured.
        device: of the encoder.
        capturing: of CUDA, unless a test has another one.
    """

    fills_up = False

    def __init__(self, encoder: Packable, bounds: Bounds, device: torch.device, capturing: Capturing) -> None:
        self._encoder = encoder
        self._max_length = bounds.max_length
        self._copies: Copies = copies_of(device)
        self._graphs: list[_Graph] = []
        with torch.inference_mode():
            self._capture(bounds, device, capturing)

    @property
    def name(self) -> str:
        """See `Encoder`."""
        return f"{self._encoder.name}, graphs to {self.most_tokens} tokens" if self._graphs else self._encoder.name

    @property
    def most_tokens(self) -> int:
        """The largest batch that is run by a graph; 0 where none is."""
        return self._graphs[-1].size if self._graphs else 0

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """See `Encoder`."""
        for graph in self._graphs:
            if len(ids) <= graph.size:
                filling = _filling(graph.size - len(ids), self._max_length)
                if len(lengths) + len(filling) <= graph.rows:
                    return self._replay(graph, ids, np.concatenate([lengths.astype(np.int64), filling]))
        return self._encoder(ids, lengths)

    def _replay(self, graph: _Graph, ids: Ids, lengths: NDArray[np.int64]) -> Tensor:
        layout = Layout(lengths)
        # What fills up may be any token that the model knows.
        filled = np.concatenate([ids, np.full(graph.size - len(ids), ids[0], ids.dtype)])
        offsets = np.full(graph.rows + 1, graph.size, np.int32)  # sequences that are not there have no tokens
        offsets[: len(layout.offsets)] = layout.offsets
        # By way of new tensors: the graph may still be reading its own for the batch before.
        graph.tokens.copy_(self._copies.to_device(self._encoder.tokens(filled, layout)))
        graph.cumulative.copy_(self._copies.to_device(offsets))
        graph.replay()
        # A copy: the next replay writes over it, and results may be on their way back then.
        return layout.unpack(graph.hidden)[: len(ids)].clone()

    def _capture(self, bounds: Bounds, device: torch.device, capturing: Capturing) -> None:
        before_bytes, used_bytes = capturing.used_bytes(), 0
        for size in bounds.sizes:
            # Not afterwards: what a graph has taken is not given back without the others.
            if _GROWTH * used_bytes > bounds.memory_bytes:
                log.info("graphs.memory_used_up", tokens=size, bytes=used_bytes, limit_bytes=bounds.memory_bytes)
                break
            try:
                graph = self._captured(size, device, capturing)
                error = self._error_of(graph)
            except Exception as failed:
                if fault_of(failed) is Fault.DEVICE and not _of_capture(failed):
                    raise
                log.info("graphs.not_captured", tokens=size, reason=str(failed).partition("\n")[0])
                return
            used_bytes = capturing.used_bytes() - before_bytes
            if not error <= _ERROR[graph.hidden.dtype]:  # NaN is no small error
                log.warning("graphs.not_used", tokens=size, reason=f"hidden states differ by {error:.1e}")
                return
            if used_bytes > bounds.memory_bytes:
                log.info("graphs.memory_used_up", tokens=size, bytes=used_bytes, limit_bytes=bounds.memory_bytes)
                return
            self._graphs.append(graph)
        if self._graphs:
            log.info("graphs.captured", sizes=[graph.size for graph in self._graphs], bytes=used_bytes)

    def _captured(self, size: int, device: torch.device, capturing: Capturing) -> _Graph:
        rows = size // _TOKENS_OF_ROW + 1
        layout = Layout(_filling(size, self._max_length))
        if len(layout) > rows:
            raise CannotCaptureError(f"sequences of {self._max_length} tokens are too short to fill it up")
        tokens = torch.from_numpy(self._encoder.tokens(np.zeros(size, np.int64), layout)).to(device)
        offsets = np.full(rows + 1, size, np.int32)
        offsets[: len(layout.offsets)] = layout.offsets
        cumulative = torch.from_numpy(offsets).to(device, copy=True)
        any_lengths = _AnyLengths(size, cumulative, min(size, self._max_length))
        replay, hidden = capturing.capture(lambda: self._encoder.run(tokens, any_lengths))
        return _Graph(size, rows, tokens, cumulative, replay, hidden)

    def _error_of(self, graph: _Graph) -> float:
        """By how much the graph differs from the encoder, on sequences of several lengths that do not fill it."""
        lengths = np.array([length for length in (graph.size // 2, graph.size // 4 - 1) if length <= self._max_length])
        if not len(lengths):
            lengths = np.array([self._max_length])
        ids = np.arange(lengths.sum()) % LEAST_TOKENS
        filling = _filling(graph.size - len(ids), self._max_length)
        expected = self._encoder(ids, lengths)
        hidden = self._replay(graph, ids, np.concatenate([lengths, filling]))
        return float((hidden - expected).abs().max() / expected.abs().max())


def _of_capture(error: Exception) -> bool:
    """Whether CUDA only refused to record something, such as a pass that waits for the device.

    It says so as it tells of a lost device, by "operation not permitted when stream is capturing" or "operation failed
    due to a previous error during capture". A torch before 2.13 cannot free memory after that, and fails in the
    warm-up: so a pass that waits is found before it is captured (`without_waiting`).
    """
    return "captur" in str(error).lower()


def _filling(missing: int, max_length: int) -> NDArray[np.int64]:
    """Lengths of sequences that add up to some tokens."""
    whole, rest = divmod(missing, max_length)
    return np.array([max_length] * whole + [rest] * (rest > 0), np.int64)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within, what waits for the device raises a RuntimeError, as far as torch knows of it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CudaGraphs:
    """Graphs of one device, which share their memory: only one runs at a time.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch's handle of it

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Capturing`."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives no types here
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UPS):
                    run()
                with without_waiting():
                    run()
            current.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Where the end of a capture fails, torch leaves its stream current: the outer block goes back to ours.
            with torch.cuda.stream(current), torch.cuda.graph(graph, pool=self._pool):
                hidden = run()
            self._pool = graph.pool()
        return graph.replay, hidden

    def used_bytes(self) -> int:
        """See `Capturing`."""
        return torch.cuda.memory_reserved(self._device)


def with_graphs(encoder: Encoder, bounds: Bounds, device: torch.device) -> Encoder:
    """The encoder, with graphs for small batches where the device and the encoder allow them.

    Args:
        encoder: of a model.
        bounds: of what is captured.
        device: of the model.
    """
    if device.type != "cuda" or not bounds.sizes or not isinstance(encoder, Packable):
        return encoder
    graphed = Graphed(encoder, bounds, device, CudaGraphs(device))
    return graphed if graphed.most_tokens else encoder
