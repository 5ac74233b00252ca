"""Parts of a batch side by side on a CPU, each on a core of its own.

Threads that share a layer wait for each other at its end, some eighty times in a forward pass, and where something else
wants one of their cores all wait for the one that lost it. Threads that have sequences of their own meet once in a
batch. A single query has nothing to be divided: it gets all threads for each layer, as before.
"""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.consumer.measured import Measurements
from embedstream.shared.logs import get_logger

from .encoder import Encoder, Ids

log = get_logger()

MOST_STREAMS = 16
"""Beyond, Python's part of each layer, which only one thread at a time can do, would be what all wait for."""
LEAST_TOKENS = 128
"""Of a part: fewer would leave a matrix product too little to do."""
_ENOUGH_TOKENS = 4096
"""Of a part: more are no faster. So a large batch is cut into more parts than streams, which then end together. What
Python does for a part only one stream at a time can do: of 8,192 tokens in six parts in place of two, batches took 1.02
to 1.1 times as long, beside a program that took a tenth of the cores too (MiniLM, AVX512-BF16)."""
_PARTS_OF_STREAM = 3
"""At most."""
_TWICE_TOKENS = 1500
"""A token of a sequence of so many takes twice as long as one alone: 1.17 times was measured at 256 (the same)."""
_UNEVEN = 1.5
"""A part may take so many times an even share; beyond, the others would wait for it."""

_TIMED_LENGTHS = (192, 96, 32)
"""Of a timed batch, each with a third of its tokens: what Python does for a sequence is the same for any length, and
only one stream at a time can do it."""
_TIMED_TOKENS = 512
"""Of each length, for each stream."""
_ROUNDS = 5
_ENOUGH_S = 1.0
"""Timing ends after so long, and two rounds that count; where it takes the first one four times as long, that must do:
cold caches are then the least of it."""
_MOST_TIME = 1.1
"""Streams may seem to take so many times the time of all threads in each layer, and are still preferred. Of batches as
small as the timed ones, with each size new to one thread or the other, 0.96 to 1.09 times was measured where full ones
took 0.95 (AVX512-BF16). And the machine does nothing else yet: beside an API that took a tenth of two cores, streams
that were as fast alone did 1.1 to 1.3 times as much (`make bench-cpu`), for all threads of a layer wait for the one
that lost its core."""


class Streams:
    """Runs parts of batches at a time; see `Encoder`.

    Args:
        encoder: on a CPU; its calls may come from several threads at a time.
        streams: how many parts at a time, at least 2.
        threads: of torch in all, at least `streams`.
    """

    def __init__(self, encoder: Encoder, streams: int, threads: int) -> None:
        self.name = f"{encoder.name} in {streams} streams"
        self.fills_up = encoder.fills_up
        self._encoder = encoder
        self._streams = streams
        self._threads = threads
        # For products of matrices the number holds for the whole process, for all else for the thread that sets it. No
        # method of ours: what a thread begins with it keeps, and with us a model's weights that nobody uses any more.
        self._take_share = partial(torch.set_num_threads, threads // streams)
        self._others = ThreadPoolExecutor(streams - 1, "stream", self._take_share)

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """See `Encoder`."""
        bounds = parts(lengths, self._streams)
        if len(bounds) == 2:
            return self._encoder(ids, lengths)
        tokens = np.concatenate([[0], np.cumsum(lengths)])[bounds]
        waiting = deque(range(len(bounds) - 1))
        done: dict[int, Tensor] = {}

        def work() -> None:
            with torch.inference_mode():
                while True:
                    try:
                        part = waiting.popleft()
                    except IndexError:
                        return
                    rows = slice(bounds[part], bounds[part + 1])
                    done[part] = self._encoder(ids[tokens[part] : tokens[part + 1]], lengths[rows])

        self._take_share()
        try:
            helping = [self._others.submit(work) for _ in range(min(self._streams, len(waiting)) - 1)]
            try:
                work()
            finally:
                waiting.clear()  # after an error nobody begins another part
                errors = [error for other in helping if (error := other.exception()) is not None]
        finally:
            torch.set_num_threads(self._threads)
        if errors:
            raise errors[0]
        return torch.cat([done[part] for part in range(len(bounds) - 1)])


def parts(lengths: Ids, streams: int) -> NDArray[np.int64]:
    """Where a batch is cut.

    Args:
        lengths: (n,) tokens of each sequence.
        streams: parts that run at a time.

    Returns:
        (parts + 1,) first rows of the parts, and `n`. One part where there is too little to be divided, or a sequence
        is so long that the others would be done long before it.
    """
    whole, tokens = np.array([0, len(lengths)]), int(lengths.sum())
    if tokens < streams * LEAST_TOKENS:
        return whole
    ends = np.cumsum(lengths * (_TWICE_TOKENS + lengths))  # of the time
    wanted = min(max(streams, tokens // _ENOUGH_TOKENS // streams * streams), _PARTS_OF_STREAM * streams)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, wanted) / wanted) + 1
    bounds = np.unique(np.concatenate([whole, cuts]))
    largest = np.diff(np.concatenate([[0], ends])[bounds]).max()
    return whole if largest > _UNEVEN * ends[-1] / streams else bounds


def with_streams(encoder: Encoder, measured: Measurements, threads: int, max_length: int, *, measure: bool) -> Encoder:
    """The encoder in streams, where that is faster, by measuring or as known from before.

    Args:
        encoder: on a CPU; its calls may come from several threads at a time.
        measured: where it is kept what is fastest here.
        threads: of torch.
        max_length: most tokens of a sequence.
        measure: whether it may be measured, which takes about ten batches.
    """
    streams = threads // max(1, -(-threads // MOST_STREAMS))  # as many threads for each, and few left over
    if streams < 2:
        return encoder
    name = f"streams-{encoder.name}"
    several = Streams(encoder, streams, threads)
    part_of_time = measured.get(name)
    if not isinstance(part_of_time, float):
        if not measure:
            return encoder
        part_of_time = _part_of_time(encoder, several, streams, max_length)
        measured.put(name, part_of_time)
        log.debug("streams.measured", streams=streams, part_of_time=round(part_of_time, 3))
    return several if part_of_time <= _MOST_TIME else encoder


def _part_of_time(one: Encoder, several: Encoder, streams: int, max_length: int) -> float:
    """Time in streams, as a part of the time without; in turn, so that what else the machine does meets both."""
    lengths = np.concatenate([_rows_of(min(length, max_length), streams * _TIMED_TOKENS) for length in _TIMED_LENGTHS])
    ids = np.arange(lengths.sum()) % 4  # there is no smaller vocabulary
    seconds = {one: math.inf, several: math.inf}
    started_s = time.perf_counter()
    with torch.inference_mode():
        for number in range(_ROUNDS):
            spent_s = time.perf_counter() - started_s
            if (number > 0 and spent_s > 4 * _ENOUGH_S) or (number > 2 and spent_s > _ENOUGH_S):
                break
            for encoder, least_s in seconds.items():
                before_s = time.perf_counter()
                encoder(ids, lengths)
                took_s = time.perf_counter() - before_s
                seconds[encoder] = min(least_s, took_s) if number > 1 else took_s  # the first one meets cold caches
    return seconds[several] / seconds[one]


def _rows_of(length: int, tokens: int) -> NDArray[np.int64]:
    """(n,) sequences of a length, with so many tokens between them."""
    return np.full(max(1, tokens // length), length)
