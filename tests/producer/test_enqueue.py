"""The enqueue script and its writer: whole requests, by the work ahead, whatever others do at the same time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from embedstream.producer import enqueue
from embedstream.producer.admission import ANY, TOTALS_FIELDS, Admission
from embedstream.producer.enqueue import Writer
from embedstream.producer.pending import PendingRequest
from embedstream.shared.errors import Overloaded, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES, Lane

pytestmark = pytest.mark.integration

FAST, BULK = Lane.INTERACTIVE, Lane.BULK
NO_BASE = (0, 0, 0, 0, 0, 0)
PLENTY = 2**40
JOB = (b"h", b"b" * 99)


class Script:
    """Calls of the script; each job has 100 bytes and costs what the test says."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys

    async def __call__(
        self,
        lane: Lane,
        n_jobs: int = 1,
        tokens: int = 100,
        *,
        ask: bool = True,
        most_tokens: int = ANY,
        most_bytes: int = PLENTY,
        size_bytes: int | None = None,
        base: tuple[int, ...] = NO_BASE,
    ) -> list[Any]:
        reserved = 100 * n_jobs if size_bytes is None else size_bytes
        head = [LANES.index(lane) + 1, int(ask), most_tokens, most_bytes, tokens, reserved, n_jobs]
        keys = [*(self.keys.lane(lane) for lane in LANES), self.keys.totals]
        (outcome,) = await enqueue._SCRIPT.run(self.redis, keys, ["rt", 10, 256, 1024, *base, *head, *(JOB * n_jobs)])
        assert isinstance(outcome, list)
        return outcome

    async def totals(self) -> list[int]:
        values: Any = await self.redis.hmget(self.keys.totals, list(TOTALS_FIELDS))
        return [int(value or 0) for value in values]

    async def lengths(self) -> list[int]:
        return [await self.redis.xlen(self.keys.lane(lane)) for lane in LANES]

    async def finish(self, lane: Lane, count: int) -> None:
        """As a consumer that has answered the oldest jobs."""
        entries: Any = await self.redis.xrange(self.keys.lane(lane), count=count)
        await self.redis.xdel(self.keys.lane(lane), *(entry_id for entry_id, _ in entries))


@pytest.fixture
def script(redis: Redis, keys: Keys) -> Script:
    return Script(redis, keys)


async def test_the_totals_hold_all_that_was_ever_added(script: Script) -> None:
    refused, ahead, lane_bytes, ids = await script(FAST, 3, tokens=70)
    assert (refused, ahead, lane_bytes, len(ids)) == (0, 0, 0, 3)
    await script(BULK, 2, tokens=50)
    await script.finish(FAST, 3)
    assert await script.totals() == [3, 70, 300, 2, 50, 200]


async def test_too_much_work_ahead_refuses_the_request_as_a_whole(script: Script) -> None:
    await script(FAST, 3, tokens=300)
    assert await script(FAST, 5, most_tokens=299) == [1, 300, 300, []]
    assert await script.lengths() == [3, 0]
    assert await script.totals() == [3, 300, 300, 0, 0, 0]
    assert (await script(FAST, 5, tokens=10**6, most_tokens=300))[0] == 0  # itself it does not count


async def test_an_empty_lane_takes_every_legal_request(script: Script) -> None:
    await script(FAST, 5)
    await script.finish(FAST, 5)
    for lane in LANES:
        assert (await script(lane, 5, tokens=10**9, most_tokens=0, most_bytes=1))[0] == 0


async def test_the_bound_in_bytes_counts_the_request_too(script: Script) -> None:
    await script(FAST, 3)
    assert await script(FAST, 2, most_bytes=499) == [2, 100, 300, []]
    assert (await script(FAST, 2, most_bytes=500))[0] == 0


async def test_what_has_left_is_not_ahead(script: Script) -> None:
    await script(FAST, 10, tokens=1000)
    await script(FAST, 5, tokens=50)
    await script.finish(FAST, 10)
    base = (10, 1000, 1000, 0, 0, 0)
    assert (await script(FAST, most_tokens=49, base=base))[:3] == [1, 50, 500]
    # More has left since the base was taken: of the tokens it counts as its part, of the bytes it does not.
    await script.finish(FAST, 3)
    assert (await script(FAST, most_tokens=0, base=base))[:3] == [1, 20, 500]


async def test_bulk_waits_behind_interactive_but_not_for_ever(script: Script) -> None:
    await script(FAST, 1, tokens=1000)
    await script(BULK, 1, tokens=500)
    assert (await script(BULK, most_tokens=1499))[:2] == [1, 1500]
    assert (await script(FAST, most_tokens=999))[:2] == [1, 1000]
    await script(FAST, 1, tokens=100_000)
    assert (await script(BULK, most_tokens=4999))[:2] == [1, 5000]  # a tenth of the fleet is its own


async def test_a_request_that_was_admitted_is_not_asked_again(script: Script) -> None:
    await script(FAST, 3)
    assert (await script(FAST, 2, ask=False, most_tokens=0, most_bytes=0))[0] == 0


async def test_totals_that_began_anew_count_from_nothing(script: Script, redis: Redis, keys: Keys) -> None:
    await script(FAST, 5, tokens=50)
    assert (await script(FAST, most_tokens=0, base=(10**6, 10**9, 10**9, 0, 0, 0)))[:3] == [1, 50, 500]
    await redis.delete(keys.lane(FAST), keys.lane(BULK), keys.totals)
    assert (await script(FAST, most_tokens=0, most_bytes=0, base=(5, 50, 500, 0, 0, 0)))[0] == 0


async def test_jobs_that_others_add_count_like_ours(script: Script, redis: Redis, keys: Keys) -> None:
    for _ in range(4):
        await redis.xadd(keys.lane(FAST), {"h": b"h", "b": b"b", "rt": b""})
    assert (await script(FAST, most_tokens=0))[:3] == [1, 4 * 256, 4 * 1024]  # nothing is known of any job
    await script(FAST, 4, tokens=40)
    assert (await script(FAST, most_tokens=0))[:3] == [1, 80, 800]
    await redis.hset(keys.totals, mapping={"i:jobs": "many"})
    assert (await script(FAST, most_tokens=0))[0] == 1


def request(n_jobs: int = 1, lane: Lane = FAST, tokens_a_job: int = 100, deadline_s: float = 60) -> PendingRequest:
    now = asyncio.get_running_loop().time()
    request_id = os.urandom(16)
    lengths, ids = np.array([tokens_a_job], np.uint32), np.zeros(tokens_a_job, np.uint16)
    jobs = [Job(request_id, place, n_jobs, place, 60_000, lengths, ids, lane=lane) for place in range(n_jobs)]
    return PendingRequest(request_id, jobs, now, now + deadline_s)


class Writers:
    """Writers of several processes, each with what its own polling has seen."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self.stopping, self.lost_contact = asyncio.Event(), asyncio.Event()
        self.tasks: list[tuple[Writer, asyncio.Task[None]]] = []

    def start(self, *, is_open: bool = True, rate: float = 100.0, max_lane_bytes: int = 0) -> tuple[Writer, Admission]:
        admission = Admission(10.0, max_lane_bytes)
        admission.tokens_per_s = rate
        writer = Writer(self.redis, self.keys, "rt", admission, self.lost_contact)
        if is_open:
            writer.open()
        self.tasks.append((writer, asyncio.create_task(writer.run(self.stopping))))
        return writer, admission

    async def stop(self) -> None:
        self.stopping.set()
        for writer, task in self.tasks:
            writer.wake()
            await asyncio.wait([task])


@pytest.fixture
async def writers(redis: Redis, keys: Keys) -> AsyncIterator[Writers]:
    writers = Writers(redis, keys)
    yield writers
    await writers.stop()


async def settled(*requests: PendingRequest) -> None:
    async with asyncio.timeout(20):
        while not all(one.error or (one.accepted and not any(sent.queued for sent in one.jobs)) for one in requests):
            await asyncio.sleep(0.005)


async def test_a_long_request_reserves_everything_with_its_first_call(writers: Writers, script: Script) -> None:
    writer, _ = writers.start()
    long = request(600)
    writer.send(long, long.jobs)
    groups = list(writer._waiting)
    assert [len(group.jobs) for group in groups] == [256, 256, 88]
    await settled(long)
    assert (await script.totals())[:2] == [600, 60_000]
    assert (await script.lengths())[0] == 600
    assert all(sent.entry_id for sent in long.jobs)


async def test_a_long_request_is_refused_as_a_whole(writers: Writers, script: Script) -> None:
    writer, _ = writers.start()
    await script(FAST, 1, tokens=1001)
    long = request(600)
    writer.send(long, long.jobs)
    await settled(long)
    assert isinstance(long.error, Overloaded)
    assert str(long.error) == "The interactive lane holds about 10.0 s of work, more than 10.0 s (--max-wait-s)."
    assert 9 <= long.error.retry_after_s <= 11.1
    short = request()
    writer.send(short, short.jobs, ask=False)  # also to see that the rest of the long one is not sent
    await settled(short)
    assert await script.lengths() == [2, 0]


async def test_two_producers_never_share_the_same_room(writers: Writers, script: Script) -> None:
    """Neither has looked since the other wrote: what the script sees decides."""
    (first, _), (second, _) = writers.start(max_lane_bytes=3000), writers.start(max_lane_bytes=3000)
    many = [request() for _ in range(60)]
    for place, one in enumerate(many):
        (first, second)[place % 2].send(one, one.jobs)
    await settled(*many)
    accepted = [one for one in many if one.accepted]
    size = sum(len(part) for part in many[0].jobs[0].job.encode())
    assert len(accepted) == 3000 // size
    assert (await script.lengths())[0] == len(accepted)


async def test_two_producers_fill_the_wait_once(writers: Writers) -> None:
    (first, _), (second, _) = writers.start(), writers.start()  # 100 tokens/s, so 10 s are 1000 tokens
    many = [request() for _ in range(60)]
    for place, one in enumerate(many):
        (first, second)[place % 2].send(one, one.jobs)
    await settled(*many)
    assert sum(one.accepted for one in many) == 11  # the last of them finds exactly the limit ahead


async def test_nothing_is_sent_before_the_reply_stream_is_there(writers: Writers, script: Script) -> None:
    writer, _ = writers.start(is_open=False)
    early = request()
    writer.send(early, early.jobs)
    await asyncio.sleep(0.05)
    assert await script.lengths() == [0, 0]
    writer.open()
    await settled(early)
    assert await script.lengths() == [1, 0]


Fault = Callable[..., Awaitable[Any]]


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("command not allowed"),
        ResponseError("Error running script (call to f_1): @user_script:9: @user_script: 9: -OOM command not allowed "),
    ],
    ids=["now", "6.2"],
)
async def test_full_memory_fails_what_is_new_and_keeps_what_was_accepted(
    writers: Writers, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(enqueue._SCRIPT, "run", full)
    writer, _ = writers.start()
    new, old = request(), request()
    old.accepted = True
    writer.send(new, new.jobs)
    writer.send(old, old.jobs, ask=False)
    async with asyncio.timeout(20):
        while any(sent.queued for sent in new.jobs + old.jobs):
            await asyncio.sleep(0.005)
    assert isinstance(new.error, Unavailable)
    assert "out of memory" in str(new.error)
    assert old.error is None
    assert 0 < old.next_check_s <= asyncio.get_running_loop().time() + enqueue.RETRY_S
    assert not writers.lost_contact.is_set()


@pytest.mark.parametrize("error", [RedisConnectionError("cut"), ReadOnlyError("replica")], ids=repr)
async def test_an_unknown_outcome_is_left_to_reconciling(
    writers: Writers, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = enqueue._SCRIPT.run
    errors = iter([error])

    async def failing(*args: Any) -> Any:
        for one in errors:
            raise one
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", failing)
    writer, _ = writers.start()
    unknown, next_one = request(), request()
    writer.send(unknown, unknown.jobs)
    async with asyncio.timeout(20):
        await writers.lost_contact.wait()
    writer.send(next_one, next_one.jobs)
    await settled(next_one)
    assert not unknown.done
    assert not unknown.accepted
    assert not unknown.jobs[0].queued


@pytest.mark.parametrize("where", ["script_args", "terms"])
async def test_a_defect_is_told_to_its_requests_and_ends_no_other(
    writers: Writers, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    writer, admission = writers.start()
    good = getattr(admission, where)

    def bad(*_: Any) -> Any:
        setattr(admission, where, good)
        return int(float("inf"))

    setattr(admission, where, bad)
    one, next_one = request(), request()
    writer.send(one, one.jobs)
    await settled(one)
    assert isinstance(one.error, Unavailable)
    writer.send(next_one, next_one.jobs)
    await settled(next_one)
    assert next_one.accepted


async def test_an_answer_that_is_not_understood_is_told_too(writers: Writers, monkeypatch: pytest.MonkeyPatch) -> None:
    run = enqueue._SCRIPT.run
    answers: Any = iter([[[0, 0]]])

    async def strange(*args: Any) -> Any:
        return next(answers, None) or await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", strange)
    writer, _ = writers.start()
    one, next_one = request(), request()
    writer.send(one, one.jobs)
    await settled(one)
    assert "could not be sent" in str(one.error)
    writer.send(next_one, next_one.jobs)
    await settled(next_one)
    assert next_one.accepted


async def test_a_reservation_that_may_be_lost_is_made_again(
    writers: Writers, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = enqueue._SCRIPT.run
    lost = iter([True])

    async def failing(*args: Any) -> Any:
        for _ in lost:
            raise RedisConnectionError("the call was lost")
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", failing)
    writer, _ = writers.start()
    long = request(600)
    writer.send(long, long.jobs)
    await settled(long)
    assert (await script.totals())[:2] == [344, 34_400]  # of the calls that came, each for itself


async def test_a_refusal_of_the_server_is_told(writers: Writers, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refusing(*_: Any) -> Any:
        raise ResponseError("WRONGTYPE Operation against a key")

    monkeypatch.setattr(enqueue._SCRIPT, "run", refusing)
    writer, _ = writers.start()
    one = request()
    writer.send(one, one.jobs)
    await settled(one)
    assert "WRONGTYPE" in str(one.error)


async def test_memory_that_is_really_full_stores_nothing(
    script: Script, redis: Redis, full_memory: Callable[[Redis], AbstractAsyncContextManager[None]]
) -> None:
    await script(FAST)
    async with full_memory(redis):
        with pytest.raises(OutOfMemoryError):
            await script(FAST, 3)
    assert await script.lengths() == [1, 0]
    assert (await script.totals())[0] == 1
