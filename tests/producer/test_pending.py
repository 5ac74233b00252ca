"""Answers that come twice, late or in two versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from embedstream.producer.assemble import assemble_parts
from embedstream.producer.pending import PendingRequest
from embedstream.shared.errors import StaleCard
from embedstream.shared.jobs import Job
from embedstream.shared.options import VectorType
from embedstream.shared.results import ROW, ResultPart, split

ID = bytes(range(16))
ONE, OTHER = b"1" * 16, b"2" * 16


def job(index: int = 0, count: int = 1) -> Job:
    return Job(ID, index, count, 8 * index, 1000, np.ones(8, np.uint32), ids=np.ones(8, np.uint16))


def whole(value: float, fingerprint: bytes = ONE, index: int = 0, count: int = 1) -> ResultPart:
    rows = np.zeros(8, ROW)
    rows["vectors"] = rows["tokens"] = 1
    vectors = np.full((8, 4), value, np.float32)
    return ResultPart(ID, fingerprint, index, count, 0, 1, 8 * index, rows, vectors, VectorType.FLOAT32)


def pending(count: int = 1) -> PendingRequest:
    return PendingRequest(ID, [job(index, count) for index in range(count)], 0.0, 1e9)


def duplicates() -> float:
    return REGISTRY.get_sample_value("embedstream_duplicate_parts_total") or 0.0


async def collected(request: PendingRequest) -> Any:
    return assemble_parts([part async for part in request.parts()], None).vectors


@pytest.mark.parametrize("sizes", [(230, 300), (300, 230), (230, 230)])
async def test_two_answers_to_one_job_are_never_mixed(sizes: tuple[int, int]) -> None:
    ones = split(whole(1.0), sizes[0])
    twos = split(whole(2.0, OTHER), sizes[1])
    assert min(len(ones), len(twos)) > 1
    request = pending()
    for part in (*ones[:-1], *twos):
        assert not request.done
        request.add(part)
    assert request.done
    np.testing.assert_array_equal(await collected(request), np.full((8, 4), 2.0))


async def test_what_comes_twice_or_late_is_counted() -> None:
    request, before = pending(2), duplicates()
    parts = split(whole(1.0, count=2), 230)
    request.add(parts[0])
    request.add(parts[0])
    assert duplicates() - before == 1
    for part in parts[1:]:
        request.add(part)
    request.add(parts[-1])  # the job is done
    assert duplicates() - before == 2
    request.add(whole(1.0, index=1, count=2))
    request.add(whole(1.0, index=1, count=2))  # the request is
    assert duplicates() - before == 3
    assert (await collected(request)).shape == (16, 4)


@pytest.mark.parametrize("part", [whole(1.0, count=2), replace(whole(1.0), job=1)])
async def test_a_part_of_another_request_is_ignored(part: ResultPart) -> None:
    request, before = pending(), duplicates()
    request.add(part)
    assert not request.done
    assert duplicates() == before


async def test_jobs_that_two_revisions_answered_do_not_belong_together() -> None:
    request = pending(2)
    request.add(whole(1.0, count=2))
    request.add(whole(2.0, OTHER, index=1, count=2))
    with pytest.raises(StaleCard, match="Two revisions"):
        await collected(request)


async def test_parts_that_were_cut_at_different_rows_are_no_answer() -> None:
    """One consumer failed a row, sent its first part and died; the other one failed none, and so cut elsewhere."""
    early, late = split(whole(1.0), 245), split(whole(2.0), 265)
    assert len(early) == len(late)
    assert early[0].n_rows != late[0].n_rows
    request = pending()
    request.add(early[0])
    for part in late[1:]:
        request.add(part)
    assert not request.done  # a row would be missing, and all behind it in the wrong place
    for part in late:
        request.add(part)
    np.testing.assert_array_equal(await collected(request), np.full((8, 4), 2.0))


async def test_the_newer_of_two_first_parts_is_kept() -> None:
    early, late = split(whole(1.0), 245), split(whole(2.0), 265)
    request = pending()
    for part in (early[0], *late):
        request.add(part)
    assert request.done
    np.testing.assert_array_equal(await collected(request), np.full((8, 4), 2.0))
