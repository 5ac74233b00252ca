"""Rows become the inputs they were made of, however they were cut into jobs and parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedstream.producer.assemble import assemble
from embedstream.producer.failures import InputFailure
from embedstream.producer.merging import Merger
from embedstream.producer.request import EmbeddedSlice
from embedstream.producer.rows import RowPlan
from embedstream.shared.errors import JobFailed, MalformedResult
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.results import ROW, ROW_TRUNCATED, ResultPart, Status, Timing, split
from embedstream.shared.tokenization import offsets

DIM = 3
REFUSED = InputFailure(Status.INVALID_INPUT, "refused before", "input")


def jobs_of(rows: NDArray[np.void], vectors: NDArray[Any], per_job: int, part_bytes: int) -> list[ResultPart]:
    """Rows as parts of jobs; a failed row's message tells which it is."""
    parts: list[ResultPart] = []
    ends = offsets(rows["vectors"])
    starts = range(0, len(rows), per_job)
    for number, first in enumerate(starts):
        some = rows[first : first + per_job].copy()
        failed = np.flatnonzero(some["status"])
        some["message"][failed] = np.arange(1, len(failed) + 1)
        whole = ResultPart(
            b"r" * 16,
            b"f" * 16,
            number,
            len(starts),
            0,
            1,
            first,
            some,
            vectors[ends[first] : ends[first + len(some)]],
            VectorType.FLOAT32,
            tuple(f"row {first + row}" for row in failed.tolist()),
            Timing(number, 10 * number, 5),
        )
        parts += split(whole, part_bytes)
    return parts


def merged(merger: Merger, parts: list[ResultPart]) -> list[EmbeddedSlice]:
    slices = [piece for part in parts if (piece := merger.add(part)) is not None]
    last = merger.finish()
    return slices if last is None else [*slices, last]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    per_token=st.booleans(),
    per_job=st.integers(1, 6),
    room=st.integers(0, 200),
    normalize=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    share_failed=st.sampled_from([0.0, 0.2]),
)
def test_slices_are_what_the_rows_say(
    counts: list[int], per_token: bool, per_job: int, room: int, normalize: bool, seed: int, share_failed: float
) -> None:
    random = np.random.default_rng(seed)
    n_rows = sum(counts)
    rows = np.zeros(n_rows, ROW)
    rows["tokens"] = random.integers(1, 6, n_rows)
    rows["status"] = np.where(random.random(n_rows) < share_failed, Status.FAILED, Status.OK)
    rows["flags"] = np.where(random.random(n_rows) < 0.2, ROW_TRUNCATED, 0)
    rows["vectors"] = np.where(rows["status"] == Status.OK, rows["tokens"] if per_token else 1, 0)
    vectors = random.normal(size=(int(rows["vectors"].sum()), DIM)).astype(np.float32)
    parts = jobs_of(rows, vectors, per_job, 80 + per_job * 30 + room)
    plan = RowPlan(np.array(counts, np.uint32), VectorOptions(per_token=per_token), normalize)
    refused = {index: REFUSED for index, count in enumerate(counts) if count == 0}
    slices = merged(Merger(plan, refused=refused, dimension=DIM, partial=True), parts)

    assert [piece.first for piece in slices] == np.cumsum([0, *(len(p.tokens) for p in slices)])[:-1].tolist()
    whole = assemble(slices)
    assert len(whole.tokens) == len(counts)
    assert whole.timing.compute_tokens == 5 * len({part.job for part in parts})
    ends = offsets(rows["vectors"])
    row, at, lost = 0, 0, 0
    for index, count in enumerate(counts):
        mine = rows[row : row + count]
        bad = np.flatnonzero(mine["status"])
        some = vectors[ends[row] : ends[row + count]]
        lost += bool((mine["flags"] & ROW_TRUNCATED).any()) and not len(bad)
        size = 1
        if count == 0 or len(bad):
            assert whole.tokens[index] == 0
            told = REFUSED if count == 0 else InputFailure(Status.FAILED, f"row {row + bad[0]}")
            assert whole.failures[index] == told
            expected, size = np.zeros((1, DIM), np.float32), 0 if per_token else 1
        elif per_token:
            expected, size = some, len(some)
        else:
            weights = mine["tokens"].astype(np.float32)[:, None]
            expected = (some * weights).sum(0, keepdims=True) / weights.sum() if count > 1 else some
            if normalize and count > 1:
                expected = expected / np.linalg.norm(expected)
        if size:
            assert whole.tokens[index] == (mine["tokens"].sum() if index not in whole.failures else 0)
            np.testing.assert_allclose(whole.vectors[at : at + size], expected, rtol=1e-5, atol=1e-6)
        at += size
        row += count
    assert len(whole.vectors) == at
    assert whole.truncated == lost
    assert set(whole.failures) == {i for i, c in enumerate(counts) if c == 0} | set(whole.failures)


def good(n: int) -> NDArray[np.void]:
    rows = np.zeros(n, ROW)
    rows["tokens"] = rows["vectors"] = 1
    return rows


def test_whole_parts_are_not_copied() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    first, second = jobs_of(good(4), vectors, 2, 10**6)
    merger = Merger(RowPlan(np.ones(4, np.uint32), VectorOptions()))
    one, two = merger.add(first), merger.add(second)
    assert one is not None
    assert two is not None
    assert (one.vectors is first.vectors, two.vectors is second.vectors) == (True, True)
    assert (two.first, merger.held_bytes, merger.finish()) == (2, 0, None)


def test_what_was_cut_before_is_counted_in_its_slice() -> None:
    parts = jobs_of(good(4), np.zeros((4, 3), np.float32), 2, 10**6)
    parts[0].rows["flags"][0] = ROW_TRUNCATED
    cut = np.array([True, False, True, True])
    slices = merged(Merger(RowPlan(np.ones(4, np.uint32), VectorOptions()), cut=cut), parts)
    assert [piece.truncated for piece in slices] == [1, 2]


def test_an_input_that_was_cut_and_failed_is_not_counted_as_cut() -> None:
    rows = good(3)
    rows["status"][0], rows["vectors"][0] = Status.FAILED, 0
    rows["flags"][2] = ROW_TRUNCATED
    parts = jobs_of(rows, np.zeros((2, 3), np.float32), 3, 10**6)
    cut = np.array([True, True, False])
    (piece,) = merged(Merger(RowPlan(np.ones(3, np.uint32), VectorOptions()), cut=cut, partial=True), parts)
    assert (piece.truncated, list(piece.failures)) == (2, [0])


def test_more_rows_may_fail_than_a_table_has_numbers_for() -> None:
    n_rows = 2**16 + 1
    rows = np.zeros(n_rows, ROW)
    rows["tokens"], rows["status"], rows["message"] = 1, Status.FAILED, 1
    whole = ResultPart(
        b"r" * 16, b"f" * 16, 0, 1, 0, 1, 0, rows, np.empty((0, 0), np.float32), VectorType.FLOAT32, ("all of it",)
    )
    merger = Merger(RowPlan(np.array([n_rows], np.uint32), VectorOptions()), partial=True)
    (piece,) = merged(merger, [whole])
    assert piece.failures == {0: InputFailure(Status.FAILED, "all of it")}


def test_the_first_failure_ends_a_request_that_wants_all() -> None:
    rows = good(3)
    rows["status"][1], rows["vectors"][1] = Status.FAILED, 0
    (part,) = jobs_of(rows, np.zeros((2, 3), np.float32), 3, 10**6)
    merger = Merger(RowPlan(np.array([2, 1], np.uint32), VectorOptions()))
    with pytest.raises(JobFailed, match="row 1"):
        merger.add(part)


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [2, 1]])
def test_answers_that_do_not_fit_are_no_answer(counts: list[int]) -> None:
    (part,) = jobs_of(good(2), np.zeros((2, 3), np.float32), 2, 10**6)
    with pytest.raises(JobFailed, match="do not fit the rows"):
        merged(Merger(RowPlan(np.array(counts, np.uint32), VectorOptions())), [part])


def test_answers_that_make_up_for_one_another_are_no_answer() -> None:
    parts = jobs_of(good(4), np.zeros((4, 3), np.float32), 2, 10**6)
    short, long = jobs_of(good(1), np.zeros((1, 3), np.float32), 1, 10**6), parts[1]
    long = replace(long, rows=good(3), vectors=np.zeros((3, 3), np.float32))
    with pytest.raises(JobFailed, match="do not fit the rows"):
        merged(Merger(RowPlan(np.ones(4, np.uint32), VectorOptions())), [*short, long])


def test_nothing_but_refused_inputs() -> None:
    plan, refused = RowPlan(np.zeros(2, np.uint32), VectorOptions()), {0: REFUSED, 1: REFUSED}
    merger = Merger(plan, refused=refused, dimension=3, partial=True)
    (piece,) = merged(merger, [])
    assert (piece.first, piece.vectors.shape, piece.tokens.tolist()) == (0, (2, 3), [0, 0])
    assert piece.failures == {0: REFUSED, 1: REFUSED}


@given(st.lists(st.integers(0, 2**32 - 1), max_size=5), st.booleans(), st.booleans(), st.sampled_from(VectorType))
def test_plans_round_trip(counts: list[int], normalize: bool, per_token: bool, dtype: VectorType) -> None:
    plan = RowPlan(np.array(counts, np.uint32), VectorOptions(dtype=dtype, per_token=per_token), normalize)
    again = RowPlan.decode(plan.encode())
    assert again.counts.tolist() == counts
    assert (again.options, again.normalize) == (plan.options, normalize)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"rows":[-1],"dtype":"float32","per_token":false,"normalize":false}']
)
def test_damaged_plans(data: bytes) -> None:
    with pytest.raises(MalformedResult):
        RowPlan.decode(data)
