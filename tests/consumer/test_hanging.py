"""Consumers that hang, stand still or are cut off, and go on; and requests that are called off."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from embedstream.consumer.entries import RawEntry
from embedstream.consumer.worker import Worker
from embedstream.shared import results
from embedstream.shared.connections import BLOCK_MS
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.results import Status

from .fleet import Fleet, Hold, steady
from .made import Device, parts, until, vectors

pytestmark = pytest.mark.integration


async def test_a_hung_consumer_loses_its_work_and_goes_on_when_it_can(fleet: Fleet) -> None:
    hold = Hold()
    hung, other = Device(hold), Device()
    async with fleet.consumer(hung, "hung", budget=64, watchdog_s=2) as worker:
        await fleet.ask(1, [[5] * 60])
        await hold.begun()
        for number in range(2, 6):
            await fleet.ask(number, [[5 + number] * 60], list(Lane)[number % 2])
        await until(lambda: fleet.in_hand(3))
        assert await fleet.redis.exists(fleet.keys.heartbeat("hung"))
        await until(lambda: _silent(fleet, "hung"))
        async with fleet.consumer(other, "other", budget=64):
            await fleet.answered()
            await fleet.emptied()
        assert len(other.inputs) == 5
        assert len(await parts(fleet.redis, fleet.keys)) == 5
        hold.go.set()
        await until(lambda: _is_there(fleet, 6))  # its late answer, of which callers take the first
        await until(lambda: fleet.redis.exists(fleet.keys.heartbeat("hung")))
        await fleet.ask(6, [[9, 9]])
        await fleet.answered()
        assert not worker._hung
        await fleet.emptied()
    assert len(hung.inputs) == 2
    late = [part for part in await parts(fleet.redis, fleet.keys) if part.request_id == (1).to_bytes(16, "little")]
    assert [part.vectors.tolist() for part in late] == [vectors([[5] * 60]).tolist()] * 2


async def test_what_a_hung_consumer_gave_back_is_no_suspect(fleet: Fleet) -> None:
    hold = Hold()
    async with fleet.consumer(Device(hold), "hung", budget=64, watchdog_s=2):
        on_device = await fleet.ask(1, [[5] * 60])
        await hold.begun()
        in_hand = await fleet.ask(2, [[6] * 60])
        await until(lambda: fleet.in_hand(2))
        await until(lambda: _given_back(fleet, in_hand))
        assert (await fleet.pending())[on_device] == ("hung", 1)
        hold.go.set()  # nobody else is there: it takes its own up again
        await fleet.answered()
        await fleet.emptied()


async def test_what_a_last_read_brings_to_a_hung_consumer_goes_back(fleet: Fleet) -> None:
    hold = Hold()
    async with fleet.consumer(Device(hold), "hung", watchdog_s=2) as worker:
        await fleet.ask(1, [[5]])
        await hold.begun()
        await until(lambda: _is_hung(worker))
        entry_id = await fleet.ask(2, [[6]])
        await asyncio.sleep(BLOCK_MS / 1000 + 0.2)  # until a read that was under way has ended
        assert (await fleet.pending()).get(entry_id) in (None, ("hung", 0))
        hold.go.set()
        await fleet.answered()


async def test_giving_back_does_not_wait_for_the_last_read(fleet: Fleet) -> None:
    hold, reading, end = Hold(), asyncio.Event(), asyncio.Event()

    async def wait(*_: object) -> list[RawEntry]:
        reading.set()
        await end.wait()
        return []

    async with fleet.consumer(Device(hold), "one") as one:
        await fleet.ask(1, [[5]])
        await hold.begun()
        entry_id = await fleet.ask(2, [[6]])
        await until(lambda: fleet.in_hand(2))
        one._reader.wait = wait  # type: ignore[method-assign, assignment] # a blocking read, as long as is wanted
        await reading.wait()
        one.stop()
        await until(lambda: _given_back(fleet, entry_id))
        end.set()
        hold.go.set()
    async with fleet.consumer(Device(), "two"):
        await fleet.answered()


async def test_a_consumer_that_stood_still_loses_its_work_and_takes_nobody_elses(fleet: Fleet) -> None:
    """As after SIGSTOP: neither device nor heartbeat moves; then both go on, and its late answer harms nobody."""
    hold, other = Hold(), Device()
    async with fleet.consumer(Device(hold), "stopped") as stopped, fleet.consumer(other, "other") as running:
        await until(lambda: steady(stopped))
        running._hung = True  # so that the first one reads the job
        await fleet.ask(1, [[5]])
        await hold.begun()
        running._hung = False
        beat = stopped._heartbeat._beat
        stopped._heartbeat._beat = lambda: None  # type: ignore[method-assign] # as long as it stands still
        await fleet.answered()
        assert other.inputs == [[5]]
        stopped._heartbeat._beat = beat  # type: ignore[method-assign] # it goes on
        await until(lambda: fleet.redis.exists(fleet.keys.heartbeat("stopped")))
        assert not stopped._heartbeat.is_steady()
        hold.go.set()
        await until(lambda: _is_there(fleet, 2))
        await fleet.ask(2, [[6]])
        await fleet.answered()
        await fleet.emptied()
        await until(lambda: steady(stopped))


async def test_after_an_outage_nobody_steals_from_the_living(fleet: Fleet) -> None:
    """All heartbeats have expired by then, those of consumers at work too."""
    hold, idle = Hold(), Device()
    async with fleet.consumer(Device(hold), "busy") as busy, fleet.consumer(idle, "idle") as other:
        await until(lambda: steady(other))
        other._hung = True  # so that the first one reads the job
        await fleet.ask(1, [[5]])
        await hold.begun()
        other._hung = False
        workers: list[Worker] = [busy, other]
        beats = [worker._heartbeat._beat for worker in workers]

        def away() -> None:
            raise RedisConnectionError("away")

        for worker in workers:
            worker._heartbeat._beat = away  # type: ignore[method-assign] # an outage of the heartbeats alone
        for name in ("busy", "idle"):
            await until(partial(_silent, fleet, name))
        await asyncio.sleep(0.2)
        for worker, beat in zip(workers, beats, strict=True):
            worker._heartbeat._beat = beat  # type: ignore[method-assign] # it is over
        await until(lambda: steady(other))
        await asyncio.sleep(0.2)  # several looks
        hold.go.set()
        await fleet.answered()
    assert idle.inputs == []


async def test_requests_that_are_called_off_are_not_computed(fleet: Fleet) -> None:
    hold = Hold()
    device = Device(hold)
    async with fleet.consumer(device) as worker:
        await fleet.ask(1, [[5]])
        await hold.begun()
        for number in range(2, 8):  # in hand, as some of them are kept
            await fleet.ask(number, [[5 + number]], list(Lane)[number % 2], result_ttl_s=60)
        await until(lambda: fleet.in_hand(7))
        called_off: dict[Any, Any] = {"c": b"".join(number.to_bytes(16, "little") for number in (3, 4, 9))}
        await fleet.redis.xadd(fleet.keys.notices, called_off)
        await until(lambda: _knows(worker, 9))
        hold.go.set()
        await fleet.emptied()
        for number in (3, 4):
            del fleet.asked[number]
        found = await fleet.answered()
    assert sorted(found) == [1, 2, 5, 6, 7]  # nobody waits for the others
    assert sorted(ids for (ids,) in device.inputs) == [5, 7, 10, 11, 12]
    kept: Any = await fleet.redis.hgetall(fleet.keys.result((3).to_bytes(16, "little")))
    part = results.decode(kept[b"0:0"])
    assert part.rows["status"].tolist() == [Status.FAILED]
    assert "cancelled" in part.message(0)


async def test_a_device_that_hangs_does_not_keep_it_from_stopping(fleet: Fleet) -> None:
    hold = Hold()
    async with fleet.consumer(Device(hold), "hung", drain_timeout_s=0.5):
        entry_id = await fleet.ask(1, [[5]])
        await hold.begun()
    assert await fleet.pending() == {entry_id: ("hung", 1)}
    assert await _silent(fleet, "hung")
    try:
        async with fleet.consumer(Device(), "next"):
            await fleet.answered()
            await fleet.emptied()
    finally:
        hold.go.set()


async def _silent(fleet: Fleet, name: str) -> bool:
    live: Any = await fleet.redis.zscore(fleet.keys.live, name)
    seconds, micros = await fleet.redis.time()
    expired = live is None or float(live) <= seconds * 1000 + micros / 1000
    return expired and not await fleet.redis.exists(fleet.keys.heartbeat(name))


async def _is_hung(worker: Worker) -> bool:
    return worker._hung


async def _is_there(fleet: Fleet, count: int) -> bool:
    return len(await parts(fleet.redis, fleet.keys)) >= count


async def _given_back(fleet: Fleet, entry_id: bytes) -> bool:
    return any([(await fleet.pending(lane)).get(entry_id, ("", 1))[1] == 0 for lane in LANES])


async def _knows(worker: Worker, number: int) -> bool:
    return number.to_bytes(16, "little") in worker._notices.cancelled
