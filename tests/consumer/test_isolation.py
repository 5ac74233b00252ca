from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from embedstream.consumer import isolation
from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.cost import CostModel
from embedstream.consumer.faults import BrokenDevice, Fault
from embedstream.consumer.isolation import Failure, Piece
from embedstream.consumer.outcome import Embedded

from .made import Device, batch_of, contents, entry

Row = tuple[bytes, int, tuple[int, ...]]

jobs = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Each failure is a log line with its traceback."""
    with structlog.testing.capture_logs():
        yield


def rows(batch: MicroBatch) -> list[Row]:
    return [(one.raw.entry_id, row, tuple(ids)) for one, row, ids in contents(batch)]


def no_complaint(_: MicroBatch) -> None:
    raise AssertionError("told of too large a batch")


def failed(pieces: list[Piece]) -> list[Row]:
    return [row for piece in pieces if not isinstance(piece.outcome, Embedded) for row in rows(piece.batch)]


@given(jobs, st.data())
def test_exactly_the_bad_rows_fail_and_each_row_runs_to_its_end_once(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    whole = batch_of(*(entry(some, number=number) for number, some in enumerate(lengths)))
    every = rows(whole)
    bad = data.draw(st.sets(st.sampled_from(every)))
    seen: list[int] = []

    def before(batch: MicroBatch) -> None:
        seen.append(batch.n_rows)
        if bad & set(rows(batch)):
            raise ValueError("a bad row")

    pieces = list(isolation.run(whole, Device(before).embed, no_complaint))
    assert set(failed(pieces)) == bad
    assert sorted(row for piece in pieces for row in rows(piece.batch)) == sorted(every)
    assert all(piece.batch.n_rows == 1 for piece in pieces if not isinstance(piece.outcome, Embedded))
    assert all(
        {one.raw.entry_id for one in piece.batch.entries} == {row[0] for row in rows(piece.batch)} for piece in pieces
    )
    assert len(seen) <= 1 + 2 * len(bad) * math.ceil(math.log2(max(2, len(every))))


def test_a_batch_too_large_for_the_memory_runs_in_halves() -> None:
    whole = batch_of(entry([10] * 8), entry([10] * 5, number=1))
    told = []

    def before(batch: MicroBatch) -> None:
        if batch.cost > 40:
            raise RuntimeError("CUDA error: out of memory")

    pieces = list(isolation.run(whole, Device(before).embed, lambda batch: told.append(batch.cost)))
    assert not failed(pieces)
    assert told == [130, 70, 60]
    assert [piece.batch.n_rows for piece in pieces] == [4, 3, 3, 3]
    assert [row for piece in pieces for row in rows(piece.batch)] == rows(whole)


def test_without_padding_what_is_too_large_is_halved_by_cost() -> None:
    whole = batch_of(entry([100, *[10] * 10]), costs=CostModel(fills_up=False))

    def before(batch: MicroBatch) -> None:
        if batch.cost > 100:
            raise MemoryError

    pieces = list(isolation.run(whole, Device(before).embed, no_complaint_of_memory))
    assert [piece.batch.lengths.tolist() for piece in pieces] == [[100], [10] * 10]


def test_a_row_too_large_for_the_memory_fails_alone() -> None:
    whole = batch_of(entry([10, 50, 10, 10]))

    def before(batch: MicroBatch) -> None:
        if batch.lengths.max() > 20:
            raise MemoryError

    pieces = list(isolation.run(whole, Device(before).embed, lambda _: None))
    assert [row for _, row, _ in failed(pieces)] == [1]
    (failure,) = [piece.outcome for piece in pieces if isinstance(piece.outcome, Failure)]
    assert (failure.fault, failure.kind) == (Fault.MEMORY, "MemoryError")


def test_what_a_failed_attempt_held_is_gone_before_the_next() -> None:
    """Its traceback would keep all tensors of the batch that did not fit, and no half would fit either."""

    class Tensor:
        """Something large."""

    alive: list[weakref.ref[Tensor]] = []

    def before(batch: MicroBatch) -> None:
        assert all(one() is None for one in alive)
        if batch.n_rows > 1:
            held = Tensor()
            alive.append(weakref.ref(held))
            raise MemoryError

    pieces = list(isolation.run(batch_of(entry([10] * 8)), Device(before).embed, no_complaint_of_memory))
    assert len(pieces) == 8
    assert not failed(pieces)
    assert len(alive) == 7


def no_complaint_of_memory(_: MicroBatch) -> None:
    """What is too large is no news here."""


def test_a_lost_device_ends_it() -> None:
    device = Device()

    def before(batch: MicroBatch) -> None:
        if batch.n_rows > 2:
            raise ValueError("a bad row")
        raise RuntimeError("CUDA error: device-side assert triggered")

    device.before = before
    with pytest.raises(BrokenDevice, match="device-side assert"):
        list(isolation.run(batch_of(entry([5] * 4)), device.embed, no_complaint))
    assert [len(batch) for batch in device.batches] == [4, 2]
