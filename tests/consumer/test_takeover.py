"""Consumers that die, hang, lose replies or meet poison: whole ones in this process, whose device is a function."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from embedstream.consumer import leases as leases_module
from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.entries import RawEntry
from embedstream.consumer.faults import BrokenDevice
from embedstream.shared.keys import GROUP
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.results import Status

from .fleet import POISON, Fleet, Hold, ended, fails, kills, over, steady, waits
from .made import Device, job_of, parts, read_as, until, vectors

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("lane", LANES)
async def test_what_a_consumer_held_when_it_vanished_is_answered(fleet: Fleet, lane: Lane) -> None:
    for number in range(20):
        await fleet.ask(number, [[5 + number]], lane)
    seconds, micros = await fleet.redis.time()
    expiry_ms = seconds * 1000 + micros / 1000 + 500
    await fleet.redis.zadd(fleet.keys.live, {"dead": expiry_ms})
    await read_as(fleet.redis, fleet.keys, "dead", lane, 20)
    device = Device()
    async with fleet.consumer(device):
        await fleet.answered()
        await fleet.emptied()
    assert len(device.inputs) == 20
    assert max(map(len, device.batches)) <= 8  # they were suspects
    assert await fleet.dead_letters() == []


async def test_what_the_living_hold_is_left_to_them(fleet: Fleet) -> None:
    await fleet.ask(1, [[5]])
    hold, idle = Hold(), Device()
    async with fleet.consumer(Device(hold), "one"):
        await hold.begun()
        async with fleet.consumer(idle, "two") as two:
            await until(lambda: steady(two))
            await asyncio.sleep(0.3)  # several looks
            hold.go.set()
            await fleet.answered()
    assert idle.batches == []


async def test_reads_whose_reply_was_lost_are_answered(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time: a server that stood still carries commands out whose callers gave up long ago."""
    monkeypatch.setattr(leases_module, "ASTRAY_MS", 100)
    async with fleet.consumer(Device()):
        await fleet.ask(1, [[5]])
        await fleet.answered()
        for number in range(2, 5):
            async with fleet.redis.pipeline(transaction=True) as pipe:  # so that the consumer's own read comes too late
                header, body = job_of(fleet.tokenizer, [[5 + number]], number).encode()
                fields: dict[Any, Any] = {"h": header, "b": body, "rt": fleet.keys.reply("me")}
                pipe.xadd(fleet.keys.lane(Lane.BULK), fields)
                pipe.xreadgroup(GROUP, "c", {fleet.keys.lane(Lane.BULK): ">"}, 10)
                _, read = await pipe.execute()
            assert len(read[0][1]) == 1
            fleet.asked[number] = [[5 + number]]
            await fleet.answered()
        await fleet.emptied()


async def test_what_is_answered_slowly_is_not_astray(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "ASTRAY_MS", 20)
    hold = Hold()
    device = Device(hold)
    async with fleet.consumer(device, budget=64):
        for number in range(10):
            await fleet.ask(number, [[5 + number] * 30], Lane.BULK)
        await hold.begun()
        await asyncio.sleep(0.4)  # several looks
        hold.go.set()
        await fleet.answered()
    assert len(device.inputs) == 10


async def test_a_row_that_fails_does_so_alone(fleet: Fleet) -> None:
    hold = Hold()
    device = Device(hold)
    async with fleet.consumer(device) as worker:
        await fleet.ask(0, [[5]])
        await hold.begun()
        for number in range(1, 20):
            bad = [POISON] if number == 7 else [9]
            await fleet.ask(number, [[number], bad, [number, number]], list(Lane)[number % 2])

        await until(lambda: waits(worker, 19 * 4))
        device.before = fails
        hold.go.set()
        found = await fleet.answered(7)
    assert found[7].rows["status"].tolist() == [Status.OK, Status.FAILED, Status.OK]
    assert found[7].message(1).endswith("ValueError.")  # its words may hold somebody's text
    np.testing.assert_array_equal(found[7].vectors, vectors([[7], [7, 7]]))
    assert max(map(len, device.batches)) > 30
    assert await fleet.dead_letters() == []


async def test_batches_too_large_for_the_memory_are_answered(fleet: Fleet) -> None:
    def before(batch: MicroBatch) -> None:
        if batch.cost > 100:
            raise RuntimeError("CUDA error: out of memory")

    device = Device(before)
    for number in range(40):
        await fleet.ask(number, [[5 + number] * 10] * 8)
    await fleet.ask(99, [[5] * 20, [6] * 20])
    async with fleet.consumer(device, budget=1000):
        await fleet.answered()
    too_large = [len(batch) for batch in device.batches if len(batch) * 10 > 100]
    # It has learned: a batch of 64 is cut seven times, and one or two more were made before its end; without, all five.
    assert len(too_large) < 24


async def test_of_a_lost_device_only_what_was_on_it_is_suspected(fleet: Fleet) -> None:
    """What has been read meanwhile, too, goes back: nobody waits for heartbeats, nobody holds it against anybody."""
    broken = await fleet.ask(0, [[POISON] * 60])
    hold = Hold()

    def before(batch: MicroBatch) -> None:
        hold(batch)
        kills(batch)

    async def die() -> None:
        async with fleet.consumer(Device(before), budget=60) as worker:
            await hold.begun()
            for number in range(1, 20):
                await fleet.ask(number, [[5 + number] * 60], list(Lane)[number % 2])
            await until(lambda: fleet.in_hand(3))
            give_back = worker._leases.give_back

            async def slowly(entries: Sequence[RawEntry]) -> None:
                await give_back(entries)
                await fleet.ask(20, [[5]])  # comes in the meantime
                await asyncio.sleep(0.2)

            worker._leases.give_back = slowly  # type: ignore[method-assign] # to make the moment long enough
            hold.go.set()
            await until(lambda: ended(worker))

    with pytest.raises(BrokenDevice, match="device-side assert"):
        await die()
    assert not await fleet.redis.exists(fleet.keys.heartbeat("c"))
    counts = {entry_id: count for lane in LANES for entry_id, (_, count) in (await fleet.pending(lane)).items()}
    assert counts.pop(broken) == 1
    assert set(counts.values()) == {0}
    device = Device()
    async with fleet.consumer(device, "next", budget=1000):
        await fleet.answered()
    assert [[POISON] * 60] in device.batches  # apart from all others


async def test_a_row_that_kills_consumers_is_found_and_its_neighbours_are_answered(fleet: Fleet) -> None:
    inputs = [[7], [8, 8], [POISON, 9], [10]]
    hold, devices, deaths = Hold(), [Device()], 0
    await fleet.ask(99, [[5]])

    async def live(life: int) -> None:
        async with fleet.consumer(devices[-1], f"life {life}") as worker:
            if life == 0:
                await hold.begun()
                fleet.poisoned = await fleet.ask(0, inputs, Lane.BULK, result_ttl_s=60)
                for number in range(1, 12):
                    await fleet.ask(number, [[20 + number]], Lane.BULK)
                await until(partial(waits, worker, 6 + 11))
                devices[0].before = kills
                hold.go.set()
            await until(partial(over, fleet, worker, 13))

    devices[0].before = hold
    for life in range(6):
        try:
            await live(life)
        except BrokenDevice:
            deaths += 1
            devices.append(Device(kills))
        else:
            break
    assert deaths == 4
    # A batch, a group, then row by row, then with the suspected row last; at last without it.
    assert len(devices[0].batches[-1]) == 15
    assert len(devices[1].batches[-1]) == 4 + 7
    assert devices[2].batches[-3:] == [[inputs[0]], [inputs[1]], [inputs[2]]]
    assert devices[3].batches[-4:] == [[inputs[0]], [inputs[1]], [inputs[3]], [inputs[2]]]
    assert inputs[2] not in devices[4].inputs
    answer = (await fleet.answered(0))[0]
    assert answer.rows["status"].tolist() == [Status.OK, Status.OK, Status.FAILED, Status.OK]
    np.testing.assert_array_equal(answer.vectors, vectors([inputs[0], inputs[1], inputs[3]]))
    (letter,) = await fleet.dead_letters()
    assert letter[b"why"] == answer.message(2).encode()
    assert [letter[name] for name in (b"src", b"lane", b"n", b"row")] == [fleet.poisoned, b"bulk", b"4", b"2"]
    await fleet.emptied()
    assert not await fleet.redis.exists(fleet.keys.trials)
    assert len(await parts(fleet.redis, fleet.keys)) == 13  # nobody was answered twice


async def test_a_job_that_kills_is_a_dead_letter_after_as_many_deaths_as_are_allowed(fleet: Fleet) -> None:
    killer, devices, deaths = await fleet.ask(0, [[POISON]]), [], 0

    async def live(life: int) -> None:
        devices.append(Device(kills))
        async with fleet.consumer(devices[-1], f"life {life}", max_consumer_deaths=2) as worker:
            await until(partial(over, fleet, worker, 1))

    for life in range(4):
        try:
            await live(life)
        except BrokenDevice:
            deaths += 1
        else:
            break
    assert deaths == 2
    assert devices[2].batches == []
    answer = (await fleet.answered(0))[0]
    assert answer.rows["status"].tolist() == [Status.FAILED]
    (letter,) = await fleet.dead_letters()
    assert {name: letter[name] for name in letter if name not in (b"h", b"b", b"rt")} == {
        b"why": answer.message(0).encode(),
        b"src": killer,
        b"lane": b"interactive",
        b"n": b"2",
    }
    await fleet.emptied()


async def test_what_was_not_begun_is_given_back_when_it_is_told_to_stop(fleet: Fleet) -> None:
    hold = Hold()
    first, second = Device(hold), Device()
    suspected: list[RawEntry] = []
    async with fleet.consumer(second, "two", lease_check_s=60) as two:  # a notice is what makes it look
        two._hung = True  # it reads nothing for now
        two._suspects.add = suspected.extend  # type: ignore[method-assign, assignment] # there should be none
        async with fleet.consumer(first, "one", budget=64) as one:
            for number in range(12):
                await fleet.ask(number, [[5 + number] * 40], list(Lane)[number % 2])
            await hold.begun()
            await until(lambda: steady(two))
            await until(lambda: fleet.in_hand(2))
            two._hung = False
            one.stop()
            await asyncio.sleep(0.2)
            hold.go.set()
        await fleet.answered()
        await fleet.emptied()
    assert len(first.inputs) + len(second.inputs) == 12
    assert len(first.inputs) <= 2  # no more than had been begun
    assert suspected == []
    assert await fleet.dead_letters() == []
