from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedstream.shared import results
from embedstream.shared.errors import MalformedResult
from embedstream.shared.options import VectorType
from embedstream.shared.results import ROW, ROW_CONTINUES, ResultPart, Status, Timing


def part(
    vectors_of_rows: list[int], dim: int = 3, dtype: VectorType = VectorType.FLOAT32, messages: tuple[str, ...] = ()
) -> ResultPart:
    rows = np.zeros(len(vectors_of_rows), ROW)
    rows["vectors"] = vectors_of_rows
    rows["tokens"] = np.arange(len(rows)) + 2
    failed = rows["vectors"] == 0
    if messages:
        rows["status"][failed] = Status.FAILED
        rows["message"][failed] = 1
    total = sum(vectors_of_rows)
    vectors = (np.arange(total * dim).reshape(total, dim) % 200).astype(dtype.numpy)
    return ResultPart(b"r" * 16, b"f" * 16, 1, 4, 0, 1, 64, rows, vectors, dtype, messages, Timing(5, 6, 7))


def assert_equal(one: ResultPart, other: ResultPart) -> None:
    for name in ("request_id", "fingerprint", "job", "n_jobs", "part", "n_parts", "first_row", "messages", "timing"):
        assert getattr(one, name) == getattr(other, name), name
    np.testing.assert_array_equal(one.rows, other.rows)
    assert one.vectors.dtype == other.vectors.dtype
    assert one.vectors.tobytes() == other.vectors.tobytes()
    assert one.vectors.shape == other.vectors.shape


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=64),
    st.integers(1, 40),
    st.sampled_from(list(VectorType)),
    st.sampled_from([(), ("why",), ("why", "ü", "")]),
)
def test_parts_round_trip(counts: list[int], dim: int, dtype: VectorType, messages: tuple[str, ...]) -> None:
    whole = part(counts, dim, dtype, messages)
    assert_equal(results.decode(whole.encode()), whole)


@settings(max_examples=500)
@given(st.data())
def test_damaged_bytes_never_crash(data: st.DataObject) -> None:
    damaged = bytearray(part([1, 0, 2], messages=("why",)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        results.decode(bytes(damaged))
    except MalformedResult:
        return


@given(st.binary(max_size=400))
def test_random_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedResult):
        results.decode(data)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=64),
    st.integers(1, 64),
    st.integers(200, 6000),
    st.sampled_from([(), ("why",)]),
)
def test_split_parts_fit_and_add_up(counts: list[int], dim: int, limit: int, messages: tuple[str, ...]) -> None:
    whole = part(counts, dim, messages=messages)
    pieces = results.split(whole, limit)
    fixed = len(part([1], 1, messages=messages).encode()) + whole.rows.nbytes + dim * 4
    assert all(len(piece.encode()) <= max(limit, fixed) for piece in pieces)
    assert [piece.part for piece in pieces] == list(range(len(pieces)))
    assert {piece.n_parts for piece in pieces} == {len(pieces)}
    np.testing.assert_array_equal(np.concatenate([piece.vectors for piece in pieces]), whole.vectors)
    rows = np.concatenate([piece.rows for piece in pieces])
    per_row = np.zeros(len(whole.rows), np.int64)
    at = np.concatenate([np.arange(piece.n_rows) + piece.first_row - whole.first_row for piece in pieces])
    np.add.at(per_row, at, rows["vectors"])
    np.testing.assert_array_equal(per_row, whole.rows["vectors"])
    last = rows[rows["flags"] & ROW_CONTINUES == 0]
    np.testing.assert_array_equal(last["tokens"], whole.rows["tokens"])  # each row ends exactly once, in order
    np.testing.assert_array_equal(last["status"], whole.rows["status"])


def test_a_small_answer_is_one_part() -> None:
    whole = part([1] * 64, 384)
    assert results.split(whole) == [whole]


def test_a_large_answer_has_parts_of_at_most_a_mebibyte() -> None:
    pieces = results.split(part([512] * 3, 1024))
    assert len(pieces) > 5
    assert all(len(piece.encode()) <= results.MAX_PART_BYTES for piece in pieces)


def test_frames_hold_several_parts() -> None:
    parts = [part([1, 1]), part([2], dtype=VectorType.FLOAT16)]
    unframed = list(results.unframe(results.frame([one.encode() for one in parts])))
    for one, other in zip(parts, unframed, strict=True):
        assert_equal(one, results.decode(other))
    assert list(results.unframe(b"")) == []


@pytest.mark.parametrize("data", [b"\x01", b"\xff\xff\xff\xffab", b"\x02\x00\x00\x00ab"])
def test_damaged_frames_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedResult):
        [results.decode(one) for one in results.unframe(data)]


def test_a_failed_job_tells_why_for_every_row() -> None:
    answer = results.failed(b"r" * 16, b"f" * 16, 2, 5, 128, 3, Status.EXPIRED, "too late")
    decoded = results.decode(answer.encode())
    assert decoded.rows["status"].tolist() == [Status.EXPIRED] * 3
    assert [decoded.message(row) for row in range(3)] == ["too late"] * 3
    assert decoded.first_row == 128


def test_long_messages_are_cut_between_characters() -> None:
    whole = part([0], messages=("ü" * 600,))
    assert results.decode(whole.encode()).message(0).startswith("ü" * 500)


def per_token(counts: list[int]) -> ResultPart:
    """An answer with one vector for each token."""
    whole = part(counts)
    rows = whole.rows.copy()
    rows["tokens"] = counts
    return replace(whole, rows=rows)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=64), st.integers(200, 3000), st.integers(200, 3000))
def test_parts_of_two_answers_are_told_from_those_of_one(counts: list[int], limit: int, other_limit: int) -> None:
    ones, twos = results.split(per_token(counts), limit), results.split(per_token(counts), other_limit)
    assert results.is_one_answer(ones)
    assert results.is_one_answer(twos)
    cuts = [[(piece.first_row, int(piece.rows["vectors"].sum())) for piece in pieces] for pieces in (ones, twos)]
    if len(ones) == len(twos) > 1 and cuts[0] != cuts[1]:
        changed = next(place for place, (one, two) in enumerate(zip(*cuts, strict=True)) if one != two)
        assert not results.is_one_answer([*ones[: changed + 1], *twos[changed + 1 :]])


def test_a_missing_row_and_a_cut_one_are_no_answer() -> None:
    pieces = results.split(per_token([3, 3, 3, 3]), 80 + 4 * 12 + 3 * 12 + 2)
    assert len(pieces) > 2
    assert not results.is_one_answer([pieces[0], *pieces[2:]])
    assert not results.is_one_answer(results.split(per_token([40]), 240)[:-1])


@pytest.mark.parametrize("failed", [0, 1, 3])
def test_no_mixture_of_two_answers_lacks_a_vector(failed: int) -> None:
    """A part may begin with the rest of a row that the other answer's part before it did not begin."""

    def answer(status: Status) -> ResultPart:
        rows = np.zeros(4, ROW)
        why: tuple[str, ...] = ()
        rows["tokens"] = rows["vectors"] = 10
        if status is not Status.OK:
            rows["status"][failed], rows["vectors"][failed], rows["message"][failed] = status, 0, 1
            why = ("why",)
        vectors = np.zeros((int(rows["vectors"].sum()), 4), np.float32)
        return ResultPart(bytes(16), bytes(16), 0, 1, 0, 1, 0, rows, vectors, VectorType.FLOAT32, why)

    for size in range(150, 700):
        one, other = results.split(answer(Status.OK), size), results.split(answer(Status.FAILED), size)
        assert results.is_one_answer(one)
        assert results.is_one_answer(other)
        if len(one) != len(other):
            continue
        for cut in range(1, len(one)):
            for mixed in ([*one[:cut], *other[cut:]], [*other[:cut], *one[cut:]]):
                place = np.concatenate([part.first_row + np.arange(part.n_rows) for part in mixed])
                vectors = np.bincount(place, np.concatenate([part.rows["vectors"] for part in mixed]), 4)
                if results.is_one_answer(mixed):
                    assert set(vectors) <= {0, 10}
                    assert set(place) == set(range(4))
