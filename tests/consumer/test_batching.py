from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.consumer.batching import MicroBatch, RowQueue, choose, fill
from embedstream.consumer.entries import Entry, RawEntry
from embedstream.shared.jobs import Job
from embedstream.shared.lanes import Lane
from embedstream.shared.results import Status
from embedstream.shared.tokenization import Tokens

rows_of_tokens = st.lists(st.integers(1, 600), min_size=1, max_size=120)


def entry(lengths: list[int], lane: Lane = Lane.INTERACTIVE, number: int = 0) -> Entry:
    """An entry whose ids tell where they come from: number of the entry, of the row, of the token."""
    columns = np.array(lengths, np.uint32)
    ids = np.concatenate(
        [np.arange(size, dtype=np.uint32) + number * 1_000_000 + row * 1000 for row, size in enumerate(lengths)]
    )
    job = Job(bytes(16), 0, 1, 0, 60_000, columns, ids=ids)
    raw = RawEntry(lane, f"{number + 1}-0".encode(), {})
    return Entry(raw, job, "", Tokens(ids, columns), np.zeros(len(lengths), np.bool_))


def contents(batch: MicroBatch) -> list[tuple[Entry, int, list[int]]]:
    ends = np.cumsum(batch.lengths)
    return [
        (batch.entries[batch.owner[place]], int(batch.row[place]), batch.ids[end - batch.lengths[place] : end].tolist())
        for place, end in enumerate(ends)
    ]


def cost(batch: MicroBatch) -> int:
    return int(batch.lengths.max()) * batch.n_rows


@given(rows_of_tokens, st.integers(1, 4096))
def test_a_chosen_group_fits_and_holds_the_oldest(lengths: list[int], budget: int) -> None:
    columns = np.array(lengths, np.int64)
    places = choose(columns, budget)
    assert 0 in places
    assert len(set(places.tolist())) == len(places)
    assert len(places) == 1 or columns[places].max() * len(places) <= budget
    assert (np.diff(columns[places]) <= 0).all()  # longest first


def test_rows_of_like_length_go_together() -> None:
    lengths = np.array([5, 500, 6, 480, 4, 510])
    assert sorted(choose(lengths, 1024).tolist()) == [0, 2, 4]
    assert sorted(choose(lengths[1:], 1024).tolist()) == [0, 2]
    assert choose(np.array([5, 500]), 1024).tolist() == [0]  # both would fit; padding 5 to 500 is not worth it


@given(rows_of_tokens, st.integers(1, 600), st.integers(-3, 20))
def test_filling_never_widens_a_batch(lengths: list[int], longest: int, room: int) -> None:
    columns = np.array(lengths, np.int64)
    places = fill(columns, longest, room)
    assert len(places) <= max(0, room)
    assert (columns[places] <= longest).all()


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Lane)), st.lists(st.integers(1, 300), min_size=1, max_size=20)), max_size=12
    ),
    st.integers(1, 2048),
)
def test_every_row_is_batched_once_with_its_own_ids(jobs: list[tuple[Lane, list[int]]], budget: int) -> None:
    queue = RowQueue(budget)
    entries = [entry(lengths, lane, number) for number, (lane, lengths) in enumerate(jobs)]
    for one in entries:
        queue.add(one.raw.lane, [one])
    seen = []
    while (batch := queue.take()) is not None:
        assert batch.n_rows == 1 or cost(batch) <= budget
        seen += contents(batch)
    assert len(queue) == 0
    for one, row, ids in seen:
        start, end = one.tokens.offsets[row], one.tokens.offsets[row + 1]
        assert ids == one.tokens.ids[start:end].tolist()
    assert sorted((one.raw.entry_id, row) for one, row, _ in seen) == sorted(
        (one.raw.entry_id, row) for one in entries for row in range(one.job.n_inputs)
    )


def test_an_empty_queue_gives_no_batch() -> None:
    assert RowQueue(100).take() is None


def test_interactive_rows_lead_and_bulk_fills_what_is_left() -> None:
    queue = RowQueue(100)
    bulk, interactive = entry([10] * 30, Lane.BULK, 0), entry([10] * 4, Lane.INTERACTIVE, 1)
    queue.add(Lane.BULK, [bulk])
    queue.add(Lane.INTERACTIVE, [interactive])
    batch = queue.take()
    assert batch is not None
    owners = [one for one, _, _ in contents(batch)]
    assert owners.count(interactive) == 4
    assert owners.count(bulk) == 6


def test_bulk_gets_its_share_while_interactive_never_ends() -> None:
    queue = RowQueue(1000)
    queue.add(Lane.BULK, [entry([100] * 64, Lane.BULK, 0), entry([100] * 64, Lane.BULK, 1)])
    got = {Lane.INTERACTIVE: 0, Lane.BULK: 0}
    for number in range(100):
        queue.add(Lane.INTERACTIVE, [entry([100] * 10, Lane.INTERACTIVE, number + 2)])
        batch = queue.take()
        assert batch is not None
        for one, _, ids in contents(batch):
            got[one.raw.lane] += len(ids)
    assert got[Lane.BULK] / sum(got.values()) == pytest.approx(0.1, abs=0.02)


def test_a_trickle_of_queries_does_not_starve_long_bulk_rows() -> None:
    queue = RowQueue(65_536)
    queue.add(Lane.BULK, [entry([250] * 64, Lane.BULK, 0), entry([5] * 64, Lane.BULK, 1)])
    for number in range(30):
        queue.add(Lane.INTERACTIVE, [entry([12, 12], Lane.INTERACTIVE, number + 2)])
        batch = queue.take()
        assert batch is not None
        if 250 in batch.lengths:
            return
    raise AssertionError("30 batches without a long bulk row")


def test_a_quiet_bulk_lane_saves_nothing_up() -> None:
    queue = RowQueue(1000)
    for number in range(50):
        queue.add(Lane.INTERACTIVE, [entry([100] * 10, Lane.INTERACTIVE, number)])
        queue.take()
    queue.add(Lane.BULK, [entry([100] * 10, Lane.BULK, 98)])
    queue.add(Lane.INTERACTIVE, [entry([100] * 10, Lane.INTERACTIVE, 99)])
    batch = queue.take()
    assert batch is not None
    assert {one.raw.lane for one, _, _ in contents(batch)} == {Lane.INTERACTIVE}


def test_failed_rows_are_not_batched() -> None:
    one = entry([5, 6, 7])
    one.fail(np.array([1]), Status.INPUT_TOO_LONG, "too long")
    queue = RowQueue(100)
    queue.add(Lane.INTERACTIVE, [one])
    batch = queue.take()
    assert batch is not None
    assert sorted(batch.row.tolist()) == [0, 2]


def test_a_row_above_the_budget_runs_alone() -> None:
    queue = RowQueue(100)
    queue.add(Lane.INTERACTIVE, [entry([5, 400, 5])])
    sizes = []
    while (batch := queue.take()) is not None:
        sizes.append(batch.lengths.tolist())
    assert sorted(sizes) == [[5, 5], [400]]
