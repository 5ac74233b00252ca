"""What Redis or the network loses is found and sent again; what is merely slow is left alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.producer import Lane, Producer, enqueue, reconcile
from embedstream.producer.admission import Admission
from embedstream.producer.enqueue import Writer
from embedstream.producer.pending import PendingRequest
from embedstream.producer.reconcile import Reconciler
from embedstream.producer.replies import Replies
from embedstream.shared import metrics, results
from embedstream.shared.connections import connect_reader
from embedstream.shared.errors import ResultTimeout, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration


@pytest.fixture
async def producer(settings: Settings, stub: Any) -> AsyncIterator[Producer]:
    async with Producer(settings=settings.model_copy(update={"reconcile_after_s": 0.2})) as producer:
        await producer.embed("warm")
        stub.seen.clear()
        yield producer


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_a_job_that_vanished_is_sent_again(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    waiting = asyncio.create_task(producer.embed([[5], [6]], timeout_s=20))
    lane = keys.lane(Lane.INTERACTIVE)

    async def queued() -> bool:
        return await redis.xlen(lane) == 1

    await until(queued)
    entries: Any = await redis.xrange(lane)
    await redis.xdel(lane, entries[0][0])
    await until(queued)  # sent again
    stub.resume()
    np.testing.assert_allclose((await waiting)[:, 0], [6, 7])
    (job,) = stub.seen
    assert 0 < job.ttl_ms < 20_000  # what is left of the time


async def test_everything_redis_held_may_vanish(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    waiting = [asyncio.create_task(producer.embed([[n]], timeout_s=20)) for n in range(1, 40)]

    async def queued() -> bool:
        return await redis.xlen(keys.lane(Lane.INTERACTIVE)) > 0

    await until(queued)
    gone = [key async for key in redis.scan_iter(f"{keys.base}:*")]
    await redis.delete(*gone)  # lanes and groups too, and the totals
    stub.resume()
    rows = await asyncio.gather(*waiting)
    np.testing.assert_allclose(np.concatenate(rows)[:, 0], np.arange(1, 40) + 1)


async def test_a_slow_job_is_not_sent_again(producer: Producer, stub: Any) -> None:
    stub.on_job = lambda *_: None  # it stays on the lane, as with a consumer that is still busy
    with pytest.raises(ResultTimeout):
        await producer.embed("a", timeout_s=2.5)
    assert len(stub.seen) == 1


async def test_an_unknown_outcome_is_cleared_up(producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is stored, but the reply to the call is lost on the way."""
    run = enqueue._SCRIPT.run
    lost = iter([True])

    async def lossy(*args: Any) -> Any:
        outcome = await run(*args)
        if next(lost, False):
            raise RedisConnectionError("the reply was lost")
        return outcome

    monkeypatch.setattr(enqueue._SCRIPT, "run", lossy)
    np.testing.assert_allclose((await producer.embed([[5]], timeout_s=20))[:, 0], [6])
    assert len(stub.seen) <= 2


async def test_a_call_that_never_arrived_is_made_again(
    producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = enqueue._SCRIPT.run
    lost = iter([True])

    async def lossy(*args: Any) -> Any:
        if next(lost, False):
            raise RedisConnectionError("the call was lost")
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", lossy)
    np.testing.assert_allclose((await producer.embed([[5]], timeout_s=20))[:, 0], [6])
    assert len(stub.seen) == 1


async def test_cut_connections_lose_nothing(producer: Producer, stub: Any, redis: Redis) -> None:
    cuts = 0

    async def cut() -> None:
        """Cut the callers' connections; a consumer that loses its own is another matter."""
        nonlocal cuts
        for _ in range(10):
            await asyncio.sleep(0.1)
            clients: Any = await redis.client_list()
            for client in clients:
                if client["cmd"] in {"xread", "evalsha", "xtrim"}:
                    cuts += await redis.client_kill_filter(_id=client["id"])

    cutting = asyncio.create_task(cut())
    while not cutting.done():
        rows = await asyncio.gather(*(producer.embed([[n]], timeout_s=20) for n in range(1, 20)))
        np.testing.assert_allclose(np.concatenate(rows)[:, 0], np.arange(1, 20) + 1)
        await asyncio.sleep(0.02)
    await cutting
    assert cuts > 5


async def test_what_redis_never_took_fails_soon(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, start_stub_on: Any
) -> None:
    with EmbeddedServer(Settings()) as server:
        async with start_stub_on(server.url), Producer(server.url, settings=settings) as producer:
            await producer.embed("a")
            await asyncio.to_thread(server._process.kill)  # type: ignore[union-attr] # it is started
            # The fleet was fine a moment ago, so the request goes out before anybody has noticed.
            with pytest.raises(Unavailable):
                async with asyncio.timeout(20):
                    await producer.embed("a")


async def test_a_redis_that_hangs_is_told_soon_and_forgotten(
    settings: Settings, start_stub_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedServer(Settings()) as server:
        async with start_stub_on(server.url), Producer(server.url, settings=settings) as producer:
            await producer.embed("a")
            process = server._process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            try:
                for _ in range(3):  # before anybody has noticed, and after
                    with pytest.raises(Unavailable, match="Redis"):
                        async with asyncio.timeout(2.5 + 1.5):  # 2.5 s are promised; the machine is busy
                            await producer.embed("a")
            finally:
                process.send_signal(signal.SIGCONT)
            await recovered(producer)


async def test_a_redis_that_restarts_is_found_again(settings: Settings, start_stub_on: Any) -> None:
    with EmbeddedServer(Settings()) as server:
        async with start_stub_on(server.url), Producer(server.url, settings=settings) as producer:
            await producer.embed("a")
            assert server._process is not None
            await asyncio.to_thread(server._process.kill)
            await asyncio.to_thread(server._process.wait)
            for _ in range(3):
                with pytest.raises(Unavailable, match="Redis"):
                    async with asyncio.timeout(4):
                        await producer.embed("a")
            await asyncio.to_thread(server.start)
            await recovered(producer)


async def recovered(producer: Producer) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await producer.embed("b", timeout_s=15)
            except Unavailable:
                await asyncio.sleep(0.1)
            else:
                return


async def test_full_memory_delays_what_was_accepted(
    producer: Producer, stub: Any, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stub.pause()
    waiting = asyncio.create_task(producer.embed([[5]], timeout_s=20))
    lane = keys.lane(Lane.INTERACTIVE)

    async def queued() -> bool:
        return await redis.xlen(lane) == 1

    await until(queued)
    run = enqueue._SCRIPT.run
    full = iter(range(2))

    async def refusing(*args: Any) -> Any:
        for _ in full:
            raise OutOfMemoryError("command not allowed")
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", refusing)
    entries: Any = await redis.xrange(lane)
    await redis.xdel(lane, entries[0][0])
    stub.resume()
    np.testing.assert_allclose((await waiting)[:, 0], [6])
    assert next(full, None) is None


async def test_a_lost_reply_stream_is_made_again_and_its_work_too(
    producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    gone = False

    def answer_into_nothing(_: Job, parts: Any) -> Any:
        return parts if gone else []  # done, and its reply lost with the stream

    stub.on_job = answer_into_nothing
    waiting = asyncio.create_task(producer.embed([[5]], timeout_s=20))

    async def served() -> bool:
        return len(stub.seen) > 0

    await until(served)
    gone = True
    await redis.delete(keys.reply(producer._sessions._instance))
    np.testing.assert_allclose((await waiting)[:, 0], [6])


async def test_thousands_that_were_lost_are_sent_in_few_calls(
    producer: Producer, stub: Any, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stub.pause()
    count = 2000
    waiting = [asyncio.create_task(producer.embed([[n % 900 + 1]], timeout_s=60)) for n in range(count)]
    lane = keys.lane(Lane.INTERACTIVE)

    async def queued() -> bool:
        return await redis.xlen(lane) == count

    await until(queued)
    run = enqueue._SCRIPT.run
    calls: list[int] = []

    async def counting(*args: Any) -> Any:
        calls.append(sum(len(arg) for arg in args[2] if isinstance(arg, bytes)))
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", counting)
    again = metrics.SENT_AGAIN.labels(Lane.INTERACTIVE)
    before = again._value.get()
    await redis.delete(lane)
    stub.resume()
    rows = await asyncio.gather(*waiting)
    np.testing.assert_allclose(np.concatenate(rows)[:, 0], np.arange(count) % 900 + 2)
    assert again._value.get() - before >= count
    assert count // enqueue.MAX_CALL_JOBS <= len(calls) <= 4 * count // enqueue.MAX_CALL_JOBS
    assert max(calls) <= enqueue.MAX_CALL_BYTES


class Session:
    """The parts of a session, driven by hand."""

    def __init__(self, redis: Redis, reader: Redis, keys: Keys) -> None:
        self.redis, self.keys, self.lost_contact = redis, keys, asyncio.Event()
        self.stream = keys.reply("me")
        self.admission = Admission(10, 0)
        self.replies = Replies(redis, reader, keys, "me", 60, self.lost_contact)
        self.writer = Writer(redis, keys, self.stream, self.admission, self.lost_contact)
        self.reconciler = Reconciler(redis, keys, self.writer, self.replies, self.admission, 3.0, self.lost_contact)

    def request(self, n_jobs: int = 1, age_s: float = 0, lane: Lane = Lane.INTERACTIVE) -> PendingRequest:
        now = asyncio.get_running_loop().time()
        request_id, lengths, ids = os.urandom(16), np.array([1], np.uint32), np.array([5], np.uint16)
        jobs = [Job(request_id, place, n_jobs, place, 60_000, lengths, ids, lane=lane) for place in range(n_jobs)]
        request = PendingRequest(request_id, jobs, now - age_s, now + 60)
        self.replies.requests[request_id] = request
        return request

    async def store(self, request: PendingRequest) -> None:
        """Put its jobs onto their lane."""
        for sent in request.jobs:
            header, body = sent.job.encode()
            fields: Any = {"h": header, "b": body, "rt": self.stream}
            entry_id: Any = await self.redis.xadd(self.keys.lane(sent.job.lane), fields)
            sent.entry_id = entry_id
        request.accepted = True

    async def answer(self, request: PendingRequest, place: int = 0, entry_id: str = "*") -> None:
        """As a consumer answers: the reply, and the job is gone."""
        sent = request.jobs[place]
        part = results.failed(
            request.request_id, bytes(16), place, len(request.jobs), place, 1, results.Status.FAILED, "stub"
        )
        await self.redis.xadd(self.stream, {"p": results.frame([part.encode()])}, id=entry_id)
        if sent.entry_id is not None:
            await self.redis.xdel(self.keys.lane(sent.job.lane), sent.entry_id)

    @property
    def queued(self) -> int:
        """Jobs that wait to be sent."""
        return sum(len(group.jobs) for group in self.writer._waiting)


@pytest.fixture
async def session(redis: Redis, redis_url: str, keys: Keys) -> AsyncIterator[Session]:
    reader = connect_reader(redis_url)
    session = Session(redis, reader, keys)
    await session.replies.keep_alive()
    yield session
    await session.replies.drop()


def duplicates() -> float:
    return float(metrics.DUPLICATES._value.get())


async def test_both_lanes_and_their_groups_are_there_before_anything_is_sent(session: Session) -> None:
    for lane in LANES:
        (group,) = await session.redis.xinfo_groups(session.keys.lane(lane))
        assert group["name"] == GROUP.encode()
    await session.redis.xgroup_destroy(session.keys.lane(Lane.BULK), GROUP)
    assert not await session.replies.keep_alive()
    assert len(await session.redis.xinfo_groups(session.keys.lane(Lane.BULK))) == 1


async def test_what_is_answered_between_the_two_looks_is_not_sent_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = session.request(2)
    await session.store(request)
    run = reconcile._SCRIPT.run

    async def answered_meanwhile(*args: Any) -> Any:
        await session.answer(request, 0)
        return await run(*args)

    monkeypatch.setattr(reconcile._SCRIPT, "run", answered_meanwhile)
    await session.reconciler._check(at_once=True)
    assert session.queued == 0
    assert [sent.done for sent in request.jobs] == [True, False]


async def test_only_what_is_on_neither_side_is_sent_again(session: Session) -> None:
    present, lost, unknown, failed = (session.request() for _ in range(4))
    for request in (present, lost, failed):
        await session.store(request)
    for request in (lost, failed):
        await session.redis.xdel(session.keys.lane(Lane.INTERACTIVE), request.jobs[0].entry_id or b"")
    failed.fail(ResultTimeout("too late"))
    for _ in range(2):  # the second look finds them under way
        await session.reconciler._check(at_once=True)
        assert [group.request for group in session.writer._waiting] == [lost, unknown]
    assert not any(group.ask for group in session.writer._waiting)


async def test_a_lost_reply_stream_makes_it_look_at_once(session: Session) -> None:
    request = session.request()
    await session.store(request)
    await session.redis.delete(session.keys.lane(Lane.INTERACTIVE))
    await session.reconciler._look(at_once=False)
    assert session.queued == 0  # it is too young to be looked for
    await session.redis.delete(session.stream)
    await session.reconciler._look(at_once=False)
    assert session.queued == 1


async def test_the_nearest_deadline_is_sent_first(session: Session) -> None:
    late, soon = session.request(), session.request()
    soon.deadline_s -= 30
    await session.reconciler._check(at_once=True)
    assert [group.request for group in session.writer._waiting] == [soon, late]
    assert soon.jobs[0].job.ttl_ms <= 30_000


async def test_a_long_queue_is_given_its_time(session: Session) -> None:
    session.admission.observe([100, 0], [b"100", b"10000", b"1", None, None, None])
    session.admission.tokens_per_s = 1000  # so 10 s of work
    young, old, bulk = session.request(age_s=15), session.request(age_s=21), session.request(age_s=4, lane=Lane.BULK)
    assert [request for request, _ in session.reconciler._due(at_once=False)] == [old, bulk]
    assert {request for request, _ in session.reconciler._due(at_once=True)} == {young, old, bulk}


async def test_large_jobs_are_looked_for_a_few_at_a_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "BYTES_A_CALL", 10)
    request = session.request(12)  # of two bytes each
    pairs = [(request, sent) for sent in request.jobs]
    calls = list(reconcile._calls(pairs))
    assert [len(call) for call in calls] == [5, 5, 2]
    assert [pair for call in calls for pair in call] == pairs


async def test_second_answers_are_counted(session: Session) -> None:
    request = session.request(2)
    before = duplicates()
    for _ in range(2):
        await session.answer(request)
    await session.replies.drain()
    assert duplicates() == before + 1
    del session.replies.requests[request.request_id]
    await session.answer(request)
    await session.replies.drain()
    assert duplicates() == before + 2


async def test_two_reads_at_one_time_hand_on_each_entry_once(session: Session) -> None:
    request = session.request(3)
    before = duplicates()
    reading = asyncio.create_task(session.replies._read(1000))
    await session.answer(request, 0)
    await session.answer(request, 1)
    await asyncio.gather(reading, session.replies.drain(), session.replies.drain())
    await session.answer(request, 2)
    await session.replies.drain()
    assert request.done
    assert duplicates() == before


async def test_an_older_copy_of_the_stream_is_read_from_its_beginning(session: Session) -> None:
    """A replica that lagged has taken over, and its clock is behind: the ids of its entries are smaller."""
    request = session.request(2)
    await session.answer(request, 0)
    await session.replies.drain()
    await session.redis.delete(session.stream)
    await session.answer(request, 1, entry_id="5-1")
    await session.replies.drain()
    assert not request.done
    assert not await session.replies.keep_alive()
    await session.replies.drain()
    assert request.done


async def test_a_read_that_was_under_way_when_the_stream_was_lost_moves_nothing(session: Session) -> None:
    request = session.request(2)
    seen = session.replies._last
    entry = [b"stream", [(b"99999999999999-0", {b"p": b""})]]
    session.replies._renewals += 1
    assert session.replies._take([entry], session.replies._renewals - 1) == 1
    assert session.replies._last == seen
    assert not request.done


async def test_only_what_was_never_accepted_is_given_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "WATCH_S", 0.02)
    accepted, new, old = session.request(age_s=10), session.request(), session.request(age_s=10)
    accepted.accepted = True
    await session.reconciler._look(at_once=False)
    stopping = asyncio.Event()
    watching = asyncio.create_task(session.reconciler.watch(stopping))
    await asyncio.sleep(0.1)
    assert old.error is None  # Redis has just answered: the request only waits for its turn
    session.reconciler._answered_s -= 10
    session.writer.answered_s = asyncio.get_running_loop().time()
    await asyncio.sleep(0.1)
    assert old.error is None
    session.writer.answered_s -= 10

    async def given_up() -> bool:
        return old.error is not None

    await until(given_up)
    stopping.set()
    await watching
    assert isinstance(old.error, Unavailable)
    assert accepted.error is None
    assert new.error is None
