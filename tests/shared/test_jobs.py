from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedstream.shared import jobs
from embedstream.shared.errors import MalformedJob
from embedstream.shared.jobs import Job, LongInputs, TruncationSide
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions, VectorType


def id_job(lengths: list[int], *, wide: bool = False, **changes: Any) -> Job:
    ids = np.arange(sum(lengths)) % 60_000
    return Job(
        **{
            "request_id": bytes(range(16)),
            "index": 0,
            "count": 1,
            "first_input": 0,
            "ttl_ms": 60_000,
            "lengths": np.array(lengths, np.uint32),
            "ids": ids.astype(np.uint32 if wide else np.uint16),
            "fingerprint": b"f" * 16,
            **changes,
        }
    )


def text_job(texts: tuple[str, ...], **changes: Any) -> Job:
    return replace(id_job([1], **changes), ids=None, texts=texts, lengths=jobs.text_lengths(texts))


def assert_equal(one: Job, other: Job) -> None:
    for field in fields(Job):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right, field.name


short = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
options = st.builds(
    VectorOptions,
    dimensions=st.none() | st.integers(1, 2**32 - 1),
    normalize=st.sampled_from([None, True, False]),
    dtype=st.sampled_from(list(VectorType)),
    per_token=st.booleans(),
)
common: dict[str, st.SearchStrategy[Any]] = {
    "request_id": st.binary(min_size=16, max_size=16),
    "fingerprint": st.binary(min_size=16, max_size=16),
    "ttl_ms": st.integers(1, 2**32 - 1),
    "first_input": st.integers(0, 2**31),
    "lane": st.sampled_from(list(Lane)),
    "options": options,
    "result_ttl_s": st.integers(0, 2**32 - 1),
    "long_inputs": st.sampled_from(list(LongInputs)),
    "truncate_to": st.integers(0, 2**32 - 1),
    "truncation_side": st.sampled_from(list(TruncationSide)),
    "add_special_tokens": st.booleans(),
    "adapter": short,
    "prompt_name": short,
    "traceparent": short,
    "tenant": short,
}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=64), st.booleans(), st.fixed_dictionaries(common))
def test_id_jobs_round_trip(lengths: list[int], wide: bool, more: dict[str, Any]) -> None:
    job = id_job(lengths, wide=wide, index=3, count=7, **more)
    assert_equal(jobs.decode(*job.encode()), job)


@given(st.lists(short, min_size=1, max_size=64), st.fixed_dictionaries(common))
def test_text_jobs_round_trip(texts: list[str], more: dict[str, Any]) -> None:
    job = text_job(tuple(texts), **more)
    assert_equal(jobs.decode(*job.encode()), job)


@settings(max_examples=500)
@given(st.data())
def test_damaged_bytes_never_crash(data: st.DataObject) -> None:
    """Any change of any byte gives a job or MalformedJob, never another error."""
    header, body = (bytearray(part) for part in id_job([3, 1, 2], adapter="a", tenant="t").encode())
    damaged = data.draw(st.sampled_from([header, body]))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    if data.draw(st.booleans()):
        del damaged[cut:]
    try:
        job = jobs.decode(bytes(header), bytes(body))
    except MalformedJob:
        return
    assert 1 <= job.n_inputs <= jobs.MAX_INPUTS


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_random_bytes_are_malformed(header: bytes, body: bytes) -> None:
    with pytest.raises(MalformedJob):
        jobs.decode(header, body)


def patched(offset: int, value: bytes, job: Job | None = None) -> tuple[bytes, bytes]:
    header, body = (job or id_job([3, 1, 2])).encode()
    return header[:offset] + value + header[offset + len(value) :], body


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"XX", "begins with"),
        (2, b"\x02", "version 2"),
        (3, b"\xf0", "flags 0xf0"),
        (3, b"\x03", "text or token ids"),
        (36, b"\x09", "job 9 of a request of 1"),
        (48, b"\x00", "0 inputs"),
        (48, b"\xff\xff\xff\xff", "4294967295 inputs"),
        (52, b"\x07", "7 tokens announced"),
        (52, b"\xff\xff\xff\xff", "several inputs share"),
        (56, b"\x00\x00\x00\x00", "ttl_ms is 0"),
        (72, b"\x03", "normalize code 3"),
        (73, b"\x05", "dtype code 5"),
        (74, b"\x02", "lane code 2"),
        (75, b"\x03", "long_inputs code 3"),
        (76, b"\x03", "truncation_side code 3"),
        (77, b"\x01", "reserved"),
        (80, b"\xff", "ends within adapter"),
    ],
)
def test_each_bad_field_is_named(offset: int, value: bytes, message: str) -> None:
    with pytest.raises(MalformedJob, match=message):
        jobs.decode(*patched(offset, value))


def test_huge_announcements_allocate_nothing() -> None:
    header, _ = patched(48, (64).to_bytes(4, "little"))
    with pytest.raises(MalformedJob, match="ends within the lengths"):
        jobs.decode(header, b"\xff" * 8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (np.array([3, 0, 3], "<u4").tobytes() + bytes(12), "input 1 has no tokens"),
        (np.array([3, 1, 2**32 - 1], "<u4").tobytes() + bytes(12), "lengths add up to 4294967299"),
        (np.array([3, 1, 2], "<u4").tobytes() + bytes(11), "11 bytes of ids"),
        (bytes(jobs.MAX_BODY_BYTES + 1), "more than 262144"),
    ],
)
def test_bad_bodies_are_named(body: bytes, message: str) -> None:
    header, _ = id_job([3, 1, 2]).encode()
    with pytest.raises(MalformedJob, match=message):
        jobs.decode(header, body)


def test_text_that_is_not_utf8_is_malformed() -> None:
    header, body = text_job(("ab",)).encode()
    with pytest.raises(MalformedJob, match="not UTF-8"):
        jobs.decode(header, body[:4] + b"\xff\xfe")


@pytest.mark.parametrize(
    "job",
    [
        id_job([1] * 65),
        id_job([10_000, 10_000]),
        id_job([140_000]),
        id_job([1], adapter="x" * 256),
        id_job([1], ttl_ms=2**32),
        id_job([1], ttl_ms=0),
    ],
    ids=["inputs", "tokens", "bytes", "string", "overflow", "ttl"],
)
def test_what_cannot_be_read_is_not_written(job: Job) -> None:
    with pytest.raises(MalformedJob):
        job.encode()


def test_a_long_input_is_a_job_alone() -> None:
    job = id_job([100_000])
    assert jobs.decode(*job.encode()).n_tokens == 100_000


def test_the_sender_is_found_in_a_damaged_header() -> None:
    header, _ = patched(73, b"\x63", id_job([3, 1, 2], index=2, count=5, first_input=128))
    assert jobs.sender_of(header) == (bytes(range(16)), 2, 5, 128, 3)
    assert jobs.sender_of(b"") is None
    assert jobs.sender_of(b"XX" + header[2:]) is None


def test_arrays_are_views_of_the_entry() -> None:
    header, body = id_job([3, 1, 2]).encode()
    ids: NDArray[Any] | None = jobs.decode(header, body).ids
    assert ids is not None
    assert not ids.flags.owndata
