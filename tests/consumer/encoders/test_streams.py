from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embedstream.consumer.encoders import streams
from embedstream.consumer.encoders.encoder import Ids
from embedstream.consumer.encoders.streams import LEAST_TOKENS, Streams, parts, with_streams


class Store(dict[str, Any]):
    def put(self, name: str, value: Any) -> None:
        self[name] = value


class Each:
    """Gives each token its id; two of its calls must be under way at a time before either goes on."""

    name = "each"
    fills_up = False

    def __init__(self, together: int = 1, fails_at: int = -1) -> None:
        self.rows: list[int] = []
        self.threads: set[int] = set()
        self.inference: set[bool] = set()
        self.fails_at = fails_at
        self._barrier = threading.Barrier(together)

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        self._barrier.wait(60)
        self.rows.append(len(lengths))
        self.threads.add(torch.get_num_threads())
        self.inference.add(torch.is_inference_mode_enabled())
        if self.fails_at in ids:
            raise RuntimeError("out of memory")
        return torch.from_numpy(ids.astype(np.float32)).unsqueeze(1)


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


LENGTHS = np.full(8, 64)
IDS = np.arange(LENGTHS.sum())


def test_parts_run_at_a_time_and_come_back_in_order() -> None:
    encoder = Each(together=2)
    with torch.inference_mode():
        hidden = Streams(encoder, 2, 4)(IDS, LENGTHS)
    assert hidden[:, 0].tolist() == IDS.tolist()
    assert encoder.rows == [4, 4]
    assert encoder.threads == {2}
    assert encoder.inference == {True}
    assert torch.get_num_threads() == 4


def test_a_query_gets_all_threads() -> None:
    encoder = Each()
    Streams(encoder, 2, 4)(IDS[:11], np.array([11]))
    assert (encoder.rows, encoder.threads) == ([1], {4})


@pytest.mark.parametrize("bad", [0, 300, 511])
def test_an_error_in_any_part_is_told_when_no_part_runs_any_more(bad: int) -> None:
    encoder = Each(fails_at=bad)
    running = Streams(encoder, 2, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        running(IDS, LENGTHS)
    assert torch.get_num_threads() == 4
    encoder.fails_at = -1
    assert running(IDS, LENGTHS)[:, 0].tolist() == IDS.tolist()


def test_after_an_error_no_part_is_begun() -> None:
    lengths = np.full(400, 64)  # six parts
    failed = threading.Event()

    class Failing(Each):
        def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
            hidden = super().__call__(ids, lengths)
            if threading.current_thread() is threading.main_thread():
                failed.set()
                raise RuntimeError("out of memory")
            failed.wait(60)
            time.sleep(1.5)  # in which the other thread tells it
            return hidden

    encoder = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        Streams(encoder, 2, 4)(np.arange(lengths.sum()), lengths)
    assert len(encoder.rows) <= 2


def test_streams_that_are_dropped_leave_no_weights_and_no_threads() -> None:
    """As where vectors in a half format differ too much: there may be no room for two models."""
    encoder = Each()
    dropped, before = weakref.ref(encoder), {*threading.enumerate()}
    running = Streams(encoder, 2, 4)
    running(IDS, LENGTHS)
    (thread,) = {*threading.enumerate()} - before
    del running
    del encoder
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert dropped() is None


@pytest.mark.parametrize(("threads", "count", "share"), [(4, 4, 1), (16, 16, 1), (24, 12, 2), (31, 15, 2), (64, 16, 4)])
def test_all_cores_are_used(threads: int, count: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_part_of_time", lambda *_: 0.5)
    encoder = Each()
    found = with_streams(encoder, Store(), threads, 512, measure=True)
    assert found.name == f"each in {count} streams"
    found(np.arange(8192), np.full(128, 64))
    assert encoder.threads == {share}


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=200), st.integers(2, 16))
def test_parts_hold_each_row_once_and_are_even(lengths: list[int], count: int) -> None:
    bounds = parts(np.array(lengths), count)
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    assert (np.diff(bounds) > 0).all()
    times = np.add.reduceat([length * (1500 + length) for length in lengths], bounds[:-1])
    if len(times) > 1:
        assert sum(lengths) >= count * LEAST_TOKENS
        assert times.max() <= 1.5 * times.sum() / count


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        *(([100] * 2, 1), ([128] * 2, 2), ([100] * 6, 2), ([100] * 163, 2), ([100] * 164, 4), ([100] * 999, 6)),
        *(([2000] + [1] * 50, 1), ([2000, 1900], 2)),
    ],
)
def test_how_many_parts(lengths: list[int], count: int) -> None:
    assert len(parts(np.array(lengths), 2)) - 1 == count


def test_a_token_of_a_long_sequence_takes_longer() -> None:
    lengths = np.array([500] * 8 + [20] * 238)  # 4,000 tokens and 4,760
    assert parts(lengths, 2).tolist() == [0, 8, 246]


@pytest.mark.parametrize(("part_of_time", "used"), [(0.9, True), (1.09, True), (1.11, False)])
def test_streams_are_used_where_they_are_faster_and_measured_once(
    part_of_time: float, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def times(one: Any, several: Any, count: int, max_length: int) -> float:
        measured.append(count)
        return part_of_time

    monkeypatch.setattr(streams, "_part_of_time", times)
    store, encoder = Store(), Each()
    for _ in range(2):
        found = with_streams(encoder, store, 4, 512, measure=True)
        assert isinstance(found, Streams) is used
    assert measured == [4]
    assert with_streams(encoder, store, 4, 512, measure=False).name == ("each in 4 streams" if used else "each")


def test_what_was_never_measured_and_a_single_thread_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Each()
    monkeypatch.setattr(streams, "_part_of_time", lambda *_: 0.5)
    assert with_streams(encoder, Store(), 4, 512, measure=False) is encoder
    assert with_streams(encoder, Store(), 1, 512, measure=True) is encoder


@pytest.mark.parametrize(("max_length", "rows"), [(16, 192), (512, 5 + 10 + 32)])
def test_measuring_runs_both_on_the_same_batch(max_length: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_ENOUGH_S", 10**6)
    encoder = Each()
    assert streams._part_of_time(encoder, Streams(encoder, 2, 4), 2, max_length) > 0
    whole = [n for n in encoder.rows if n == rows]
    assert len(whole) == streams._ROUNDS
    assert sum(encoder.rows) == 2 * rows * len(whole)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.05, 5), (0.45, 3), (2.1, 2), (3.0, 1)])
def test_what_takes_long_is_measured_in_fewer_rounds(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("embedstream.consumer.encoders.streams.time.perf_counter", lambda: now[0])

    def of(seconds: float) -> Any:
        calls: list[int] = []

        def encoder(ids: Ids, lengths: Ids) -> None:
            calls.append(len(lengths))
            now[0] += seconds

        return encoder, calls

    (one, calls), (several, others) = of(seconds), of(seconds / 2)
    assert streams._part_of_time(one, several, 2, 16) == pytest.approx(0.5)
    assert len(calls) == len(others) == rounds


@pytest.mark.parametrize(("slower", "expected"), [("one", 0.5), ("several", 2.0)])
def test_the_fastest_round_of_each_counts(slower: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("embedstream.consumer.encoders.streams.time.perf_counter", lambda: now[0])

    def of(name: str) -> Any:
        steps = iter([0.5, 9.0, 2.0 if name == slower else 1.0, 7.0, 7.0])

        def encoder(ids: Ids, lengths: Ids) -> None:
            now[0] += next(steps)

        return encoder

    monkeypatch.setattr(streams, "_ENOUGH_S", 10**6)
    assert streams._part_of_time(of("one"), of("several"), 2, 16) == expected
