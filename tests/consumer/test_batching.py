from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.consumer.batching import in_batches, row_by_row
from embedstream.consumer.budget import Budget
from embedstream.consumer.cost import PASS_TOKENS, CostModel
from embedstream.consumer.pace import Pace
from embedstream.consumer.row_queue import ABOUT_MS, Dropped, RowQueue
from embedstream.shared.lanes import Lane
from embedstream.shared.results import Status

from .made import batch_of, contents, entry

PADDED, PACKED = CostModel(), CostModel(fills_up=False, knee=100)
both = pytest.mark.parametrize("costs", [PADDED, PACKED])


def queue_of(budget: int, costs: CostModel = PADDED) -> RowQueue:
    return RowQueue(Budget(budget), Pace(budget, costs))


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Lane)), st.lists(st.integers(1, 300), min_size=1, max_size=20)), max_size=12
    ),
    st.integers(1, 2048),
    st.sampled_from([PADDED, PACKED]),
)
def test_every_row_is_batched_once_with_its_own_ids(
    jobs: list[tuple[Lane, list[int]]], budget: int, costs: CostModel
) -> None:
    queue = queue_of(budget, costs)
    entries = [entry(lengths, lane, number) for number, (lane, lengths) in enumerate(jobs)]
    for one in entries:
        queue.add(one.raw.lane, [one])
    seen = []
    while (batch := queue.take()) is not None:
        assert batch.n_rows == 1 or batch.cost <= budget
        seen += contents(batch)
    assert len(queue) == 0
    for one, row, ids in seen:
        start, end = one.tokens.offsets[row], one.tokens.offsets[row + 1]
        assert ids == one.tokens.ids[start:end].tolist()
    assert sorted((one.raw.entry_id, row) for one, row, _ in seen) == sorted(
        (one.raw.entry_id, row) for one in entries for row in range(one.job.n_inputs)
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Lane)),
            st.sampled_from(["", "query", "passage"]),
            st.lists(st.integers(1, 300), min_size=1, max_size=8),
        ),
        max_size=16,
    ),
    st.integers(1, 2048),
    st.integers(0, 6),
    st.sampled_from([PADDED, PACKED]),
)
def test_a_batch_has_one_adapter_that_of_the_oldest_row(
    jobs: list[tuple[Lane, str, list[int]]], budget: int, later: int, costs: CostModel
) -> None:
    queue = queue_of(budget, costs)
    entries = [entry(lengths, lane, number, adapter) for number, (lane, adapter, lengths) in enumerate(jobs)]
    waiting: dict[Lane, list[tuple[int, int]]] = {lane: [] for lane in Lane}  # rows in order of arrival
    unseen = list(entries)
    while unseen or len(queue):
        for one in unseen[: 1 + later]:  # some come while others wait
            queue.add(one.raw.lane, [one])
            waiting[one.raw.lane] += [(id(one), row) for row in range(one.job.n_inputs)]
        unseen = unseen[1 + later :]
        batch = queue.take()
        assert batch is not None
        rows = [(id(one), row) for one, row, _ in contents(batch)]
        assert {one.adapter for one in batch.entries} == {batch.adapter}
        assert any(waiting[lane] and waiting[lane][0] in rows for lane in Lane)
        for lane in Lane:
            lead = [row for row in waiting[lane] if row in rows]
            waiting[lane] = [row for row in waiting[lane] if row not in lead]
            rows = [row for row in rows if row not in lead]
        assert rows == []  # each came out once
    assert waiting == {lane: [] for lane in Lane}


def test_rows_of_another_adapter_do_not_fill_a_batch() -> None:
    queue = queue_of(100)
    queue.add(Lane.BULK, [entry([10] * 30, Lane.BULK, 0, "passage"), entry([10] * 2, Lane.BULK, 1, "query")])
    queue.add(Lane.INTERACTIVE, [entry([10] * 4, Lane.INTERACTIVE, 2, "query")])
    batch = queue.take()
    assert batch is not None
    assert [one.raw.entry_id for one, _, _ in contents(batch)] == [b"3-0"] * 4 + [b"2-0"] * 2
    assert [half.adapter for half in batch.halves()] == ["query", "query"]


@pytest.mark.parametrize("adapters", [["query"], ["query", "passage"], ["a", "b", "c", "d", "e"]])
def test_bulk_gets_its_share_whatever_the_adapters(adapters: list[str]) -> None:
    """Its rows of an adapter that no interactive row has can only go in turns of their own."""
    queue = queue_of(1000)
    bulk = [entry([100] * 16, Lane.BULK, number, ["bulk", "few"][number % 5 == 4]) for number in range(20)]
    queue.add(Lane.BULK, bulk)
    got = {Lane.INTERACTIVE: 0, Lane.BULK: 0}
    for number in range(200):
        adapter = adapters[number % len(adapters)]
        queue.add(Lane.INTERACTIVE, [entry([100] * 10, Lane.INTERACTIVE, number + 20, adapter)])
        batch = queue.take()
        assert batch is not None
        for one, _, ids in contents(batch):
            got[one.raw.lane] += len(ids)
    assert got[Lane.BULK] / sum(got.values()) == pytest.approx(0.1, abs=0.02)


def test_bulk_earns_a_turn_by_what_the_turn_can_hold() -> None:
    queue = queue_of(1000)
    queue.add(Lane.BULK, [entry([100], Lane.BULK, 0, "few"), entry([100] * 64, Lane.BULK, 1, "many")])
    queue.add(Lane.INTERACTIVE, [entry([100] * 30, Lane.INTERACTIVE, 2)])
    batches = [queue.take(), queue.take()]
    assert [batch and batch.adapter for batch in batches] == ["", "few"]


def test_an_empty_queue_gives_no_batch() -> None:
    assert queue_of(100).take() is None


def test_interactive_rows_lead_and_bulk_fills_what_is_left() -> None:
    queue = queue_of(100)
    bulk, interactive = entry([10] * 30, Lane.BULK, 0), entry([10] * 4, Lane.INTERACTIVE, 1)
    queue.add(Lane.BULK, [bulk])
    queue.add(Lane.INTERACTIVE, [interactive])
    batch = queue.take()
    assert batch is not None
    owners = [one for one, _, _ in contents(batch)]
    assert owners.count(interactive) == 4
    assert owners.count(bulk) == 6


@both
def test_bulk_gets_its_share_while_interactive_never_ends(costs: CostModel) -> None:
    queue = queue_of(1000, costs)
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
    queue = queue_of(65_536)
    queue.add(Lane.BULK, [entry([250] * 64, Lane.BULK, 0), entry([5] * 64, Lane.BULK, 1)])
    for number in range(30):
        queue.add(Lane.INTERACTIVE, [entry([12, 12], Lane.INTERACTIVE, number + 2)])
        batch = queue.take()
        assert batch is not None
        if 250 in batch.lengths:
            return
    raise AssertionError("30 batches without a long bulk row")


def test_a_quiet_bulk_lane_saves_nothing_up() -> None:
    queue = queue_of(1000)
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
    queue = queue_of(100)
    queue.add(Lane.INTERACTIVE, [one])
    batch = queue.take()
    assert batch is not None
    assert sorted(batch.row.tolist()) == [0, 2]


def test_a_row_above_the_budget_runs_alone() -> None:
    queue = queue_of(100)
    queue.add(Lane.INTERACTIVE, [entry([5, 400, 5])])
    sizes = []
    while (batch := queue.take()) is not None:
        sizes.append(batch.lengths.tolist())
    assert sorted(sizes) == [[5, 5], [400]]


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=5))
def test_halves_hold_the_rows_in_their_order(lengths: list[list[int]]) -> None:
    whole = batch_of(*(entry(some, number=number) for number, some in enumerate(lengths)))
    first, second = whole.halves()
    assert 0 <= first.n_rows - second.n_rows <= 1
    assert contents(first) + contents(second) == contents(whole)
    for half in (first, second):
        assert {id(one) for one in half.entries} == {id(one) for one, _, _ in contents(half)}


@both
@given(st.lists(st.integers(1, 300), min_size=2, max_size=40))
def test_halves_by_cost_cost_about_the_same(costs: CostModel, lengths: list[int]) -> None:
    whole = batch_of(entry(lengths), costs=costs)
    first, second = whole.halves(by_cost=True)
    assert (first.costs, second.costs) == (costs, costs)
    assert first.n_rows >= 1
    assert second.n_rows >= 1
    assert contents(first) + contents(second) == contents(whole)
    longest = int(costs.of_rows(whole.lengths).max())
    assert max(first.cost, second.cost) <= whole.cost / 2 + longest


def test_a_batch_knows_what_it_costs_here() -> None:
    assert batch_of(entry([5, 9, 100]), costs=PACKED).cost == 5 + 9 + 100 + 100
    assert [batch.cost for batch in row_by_row(entry([9, 100]), PACKED)] == [9, 200]
    assert batch_of(entry([5, 9, 100]), costs=PADDED).cost == 300


def test_a_batch_knows_its_size() -> None:
    batch = batch_of(entry([5, 9]), entry([7], Lane.BULK, 1))
    assert (batch.n_rows, batch.n_tokens, batch.cost) == (3, 21, 27)
    assert [batch.tokens_of(lane) for lane in Lane] == [14, 7]
    assert batch.halves()[1].cost == 5


def test_jobs_nobody_waits_for_are_dropped() -> None:
    queue = queue_of(20)
    late, begun, gone, good = (
        entry([10, 10], Lane.INTERACTIVE, 0, ttl_ms=1000),
        entry([10, 10, 10], Lane.BULK, 1, ttl_ms=1000),
        entry([10], Lane.BULK, 2, request_id=b"gone" * 4),
        entry([10, 10], Lane.BULK, 3),
    )
    queue.add(Lane.BULK, [begun])
    batch = queue.take()
    assert batch is not None
    queue.add(Lane.INTERACTIVE, [late])
    queue.add(Lane.BULK, [gone, good])
    assert queue.drop(1001, {}) == []  # it was enqueued at 1 ms: not a moment too early
    dropped = queue.drop(1003, {b"gone" * 4: 10**15})
    assert [(id(one), why) for one, why in dropped] == [
        (id(late), Dropped.EXPIRED),
        (id(begun), Dropped.EXPIRED),
        (id(gone), Dropped.CANCELLED),
    ]
    rest = queue.take()
    assert rest is not None
    assert sorted((one.raw.entry_id, row) for one, row, _ in contents(rest)) == [(b"4-0", 0), (b"4-0", 1)]
    assert len(queue) == 0


def test_what_was_not_begun_is_released_whole() -> None:
    queue = queue_of(20)
    begun, bulk, interactive = entry([10] * 3), entry([10], Lane.BULK, 1), entry([10] * 4, Lane.INTERACTIVE, 2)
    queue.add(Lane.INTERACTIVE, [begun, interactive])
    queue.add(Lane.BULK, [bulk])
    assert queue.take() is not None
    assert queue.release() == [interactive, bulk]
    assert queue.release() == []
    batch = queue.take()
    assert batch is not None
    assert batch.entries == (begun,)
    assert batch.n_rows == 1  # the rest of what has been begun is still wanted
    assert queue.take() is None


def paced(budget: int, pass_tokens: int = PASS_TOKENS) -> RowQueue:
    """A queue before a device of 1000 tokens a second, so that a slice of 0.1 s is 100 tokens."""
    pace = Pace(budget, CostModel(pass_tokens=pass_tokens))
    pace.observe(budget, budget, budget / 1000)
    pace.observe(1, 1, 0.001)
    return RowQueue(Budget(budget), pace, slice_s=0.1, bulk_share=0.1)


def test_bulk_keeps_to_the_slice_while_interactive_is_about() -> None:
    queue = paced(1000)
    queue.add(Lane.BULK, [entry([10] * 64, Lane.BULK, number) for number in range(8)])
    first = queue.take(5000)
    assert first is not None
    assert first.cost == 1000  # nobody else is there
    queue.add(Lane.INTERACTIVE, [entry([10], Lane.INTERACTIVE, 9)])
    beside = queue.take(6000)
    assert beside is not None
    assert beside.tokens_of(Lane.INTERACTIVE) == 10
    assert beside.cost == 70  # bulk fills up what a pass costs anyway, and makes no short query a long one
    sliced = queue.take(6000 + ABOUT_MS - 1)
    assert sliced is not None
    assert 80 <= sliced.cost <= 100
    full = queue.take(6000 + ABOUT_MS)
    assert full is not None
    assert full.cost == 1000


def test_beside_another_batch_bulk_waits_while_interactive_is_about() -> None:
    """Or who comes next would wait for two slices."""
    queue = paced(1000)
    queue.add(Lane.BULK, [entry([10] * 64, Lane.BULK, number) for number in range(8)])
    queue.add(Lane.INTERACTIVE, [entry([10], Lane.INTERACTIVE, 9)])
    first = queue.take(6000, beside=True)
    assert first is not None
    assert first.tokens_of(Lane.INTERACTIVE) == 10
    assert queue.take(6000 + ABOUT_MS - 1, beside=True) is None
    assert queue.take(6000 + ABOUT_MS - 1) is not None
    later = queue.take(6000 + ABOUT_MS, beside=True)
    assert later is not None
    assert later.cost == 1000


def test_where_a_pass_costs_much_bulk_fills_it_to_a_slice() -> None:
    queue = paced(1000, pass_tokens=10_000)
    queue.add(Lane.BULK, [entry([10] * 64, Lane.BULK, 0)])
    queue.add(Lane.INTERACTIVE, [entry([10], Lane.INTERACTIVE, 1)])
    batch = queue.take()
    assert batch is not None
    assert 80 <= batch.cost <= 100


def test_interactive_batches_are_not_cut_to_the_slice() -> None:
    queue = paced(1000)
    queue.add(Lane.INTERACTIVE, [entry([10] * 50)])
    batch = queue.take()
    assert batch is not None
    assert batch.cost == 500


def test_bulk_has_its_share_of_the_time_in_a_trickle() -> None:
    """Queries that are few and short use the time up, not the tokens; and what fills up beside them is no turn."""
    queue = paced(1000)
    queue.add(Lane.BULK, [entry([90] * 64, Lane.BULK, number) for number in range(4)])
    seconds = dict.fromkeys(Lane, 0.0)
    for number in range(300):
        queue.add(Lane.INTERACTIVE, [entry([30], Lane.INTERACTIVE, number + 10)])
        batch = queue.take(1000.0 * number)
        assert batch is not None
        lane = Lane.BULK if 90 in batch.lengths else Lane.INTERACTIVE
        seconds[lane] += batch.cost / 1000
    assert seconds[Lane.BULK] / sum(seconds.values()) >= 0.09
    assert seconds[Lane.BULK] / sum(seconds.values()) <= 0.3


def test_jobs_apart_run_in_batches_of_their_own() -> None:
    one, two = entry([10] * 7), entry([10] * 4, Lane.BULK, 1)
    one.fail(np.array([2]), Status.INPUT_TOO_LONG, "too long")
    batches = in_batches([one, two], 50, PADDED)
    assert all(batch.cost <= 50 for batch in batches)
    assert len(batches) == 2
    assert sorted((part.raw.entry_id, row) for batch in batches for part, row, _ in contents(batch)) == sorted(
        [(one.raw.entry_id, row) for row in range(7) if row != 2] + [(two.raw.entry_id, row) for row in range(4)]
    )
    assert in_batches([], 50, PADDED) == []


def test_jobs_apart_are_split_by_adapter_too() -> None:
    jobs = [entry([10] * 4, number=number, adapter=name) for number, name in enumerate(["a", "b", "a", ""])]
    batches = in_batches(jobs, 1000, PADDED)
    assert [(batch.adapter, batch.n_rows) for batch in batches] == [("a", 8), ("b", 4), ("", 4)]


@pytest.mark.parametrize(("last", "order"), [(None, [0, 1, 3]), (0, [1, 3, 0]), (2, [0, 1, 3]), (3, [0, 1, 3])])
def test_a_job_row_by_row(last: int | None, order: list[int]) -> None:
    one = entry([3, 4, 5, 6])
    one.fail(np.array([2]), Status.INPUT_TOO_LONG, "too long")
    batches = row_by_row(one, PADDED, last)
    expected = contents(batch_of(entry([3, 4, 5, 6])))
    ids = {row: ids for _, row, ids in expected}
    assert [contents(batch) for batch in batches] == [[(one, row, ids[row])] for row in order]
