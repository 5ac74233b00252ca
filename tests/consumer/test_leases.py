from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from embedstream.consumer import leases as leases_module
from embedstream.consumer.entries import RawEntry
from embedstream.consumer.hand import Hand
from embedstream.consumer.leases import Leases
from embedstream.shared.connections import connect, create_group
from embedstream.shared.keys import FIELD_RELEASED, GROUP, Keys
from embedstream.shared.lanes import LANES, Lane

from .made import pending, read_as

pytestmark = pytest.mark.integration

LONG_MS = 300_000


@pytest.fixture
async def redis(redis_url: str, keys: Keys) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    for lane in LANES:
        await create_group(client, keys.lane(lane), GROUP)
    yield client
    await client.aclose()


def leases_of(redis: Redis, keys: Keys, name: str, backstop_ms: int = LONG_MS, hand: Hand | None = None) -> Leases:
    return Leases(redis, keys, name, Hand() if hand is None else hand, backstop_ms)


async def held(redis: Redis, keys: Keys, owner: str, count: int = 1, lane: Lane = Lane.INTERACTIVE) -> list[bytes]:
    """Entries that a consumer has read and does nothing with."""
    for number in range(count):
        await redis.xadd(keys.lane(lane), {"h": f"header {number}", "b": "body"})
    return await read_as(redis, keys, owner, lane, count)


async def alive(redis: Redis, keys: Keys, *names: str) -> None:
    seconds, _ = await redis.time()
    await redis.zadd(keys.live, dict.fromkeys(names, seconds * 1000 + 60_000))


async def consumers(redis: Redis, keys: Keys) -> set[str]:
    found: Any = await redis.xinfo_consumers(keys.lane(Lane.INTERACTIVE), GROUP)
    return {item["name"].decode() for item in found}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("expired", [True, False])
async def test_what_the_dead_held_is_taken_over_with_one_suspicion(
    redis: Redis, keys: Keys, lane: Lane, expired: bool
) -> None:
    ids = await held(redis, keys, "dead", 3, lane)
    if expired:  # a heartbeat that has run out is none
        seconds, _ = await redis.time()
        await redis.zadd(keys.live, {"dead": seconds * 1000 - 10})
    taken = await leases_of(redis, keys, "me").abandoned(100)
    assert [(raw.lane, raw.entry_id, raw.deaths) for raw in taken] == [(lane, entry_id, 1) for entry_id in ids]
    assert taken[1].fields == {b"h": b"header 1", b"b": b"body"}
    assert await pending(redis, keys, lane) == dict.fromkeys(ids, ("me", 2))


async def test_a_death_counts_only_for_what_was_on_the_device(redis: Redis, keys: Keys) -> None:
    """The first death suspects all that was in hand; the next ones only what had been booked as under way."""
    await held(redis, keys, "dead", 2)
    (one, two) = await leases_of(redis, keys, "second").abandoned(100)
    assert [raw.entry_id for raw in await leases_of(redis, keys, "second").book([one])] == [one.entry_id]
    taken = await leases_of(redis, keys, "third").abandoned(100)
    assert {raw.entry_id: raw.deaths for raw in taken} == {one.entry_id: 2, two.entry_id: 1}
    taken = await leases_of(redis, keys, "fourth").abandoned(100)  # and the third never got as far as to book
    assert {raw.entry_id: raw.deaths for raw in taken} == {one.entry_id: 2, two.entry_id: 1}


async def test_the_living_are_left_alone(redis: Redis, keys: Keys) -> None:
    ids = await held(redis, keys, "other")
    await alive(redis, keys, "other")
    assert await leases_of(redis, keys, "me").abandoned(100) == []
    assert await pending(redis, keys) == {ids[0]: ("other", 1)}


async def test_consumers_that_are_gone_leave_the_group_with_their_last_entry(redis: Redis, keys: Keys) -> None:
    stream = keys.lane(Lane.INTERACTIVE)
    for name in ("me", "idle", "gone"):
        await redis.xgroup_createconsumer(stream, GROUP, name)
    (entry_id,) = await held(redis, keys, "dead")
    await alive(redis, keys, "idle")
    mine = leases_of(redis, keys, "me")
    await mine.abandoned(100)
    assert await consumers(redis, keys) == {"me", "idle", "dead"}  # its entry was taken just now
    assert await pending(redis, keys) == {entry_id: ("me", 2)}
    await mine.abandoned(100)
    assert await consumers(redis, keys) == {"me", "idle"}


async def test_no_more_is_taken_than_asked_for(redis: Redis, keys: Keys) -> None:
    for lane in LANES:
        await held(redis, keys, "dead", 3, lane)
        await held(redis, keys, "dead too", 2, lane)
    mine = leases_of(redis, keys, "me")
    taken = [await mine.abandoned(most) for most in (0, 4, 3, 100, 100)]
    assert [len(some) for some in taken] == [0, 4, 3, 3, 0]
    assert len({raw.place for some in taken for raw in some}) == 10
    assert {raw.lane for raw in taken[0] + taken[1]} == {Lane.INTERACTIVE}


@pytest.mark.parametrize("lane", LANES)
async def test_what_is_given_back_is_taken_at_once_and_unsuspected(redis: Redis, keys: Keys, lane: Lane) -> None:
    owner = leases_of(redis, keys, "owner")
    ids = await held(redis, keys, "owner", 3, lane)
    stolen = await held(redis, keys, "other", 1, lane)
    await alive(redis, keys, "owner", "other")
    await owner.give_back([RawEntry(lane, entry_id, {}) for entry_id in ids[:2] + stolen])
    notices: Any = await redis.xrange(keys.notices)
    assert [fields for _, fields in notices] == [{FIELD_RELEASED: b"owner"}]
    taken = await leases_of(redis, keys, "me").abandoned(100)
    assert [(raw.entry_id, raw.deaths) for raw in taken] == [(entry_id, 0) for entry_id in ids[:2]]
    assert await pending(redis, keys, lane) == {
        ids[0]: ("me", 1),
        ids[1]: ("me", 1),
        ids[2]: ("owner", 1),
        stolen[0]: ("other", 1),
    }
    assert (
        await leases_of(redis, keys, "third").abandoned(100) != []
    )  # the new owner has no heartbeat, and so it counts
    assert (await pending(redis, keys, lane))[ids[0]] == ("third", 2)


async def test_what_was_given_back_stays_unsuspected_when_its_owner_dies(redis: Redis, keys: Keys) -> None:
    (entry_id,) = await held(redis, keys, "owner")
    await leases_of(redis, keys, "owner").give_back([RawEntry(Lane.INTERACTIVE, entry_id, {})])
    (taken,) = await leases_of(redis, keys, "me").abandoned(100)
    assert taken.deaths == 0


async def test_suspects_that_are_given_back_stay_suspects(redis: Redis, keys: Keys) -> None:
    await held(redis, keys, "dead")
    owner = leases_of(redis, keys, "owner")
    taken = await owner.abandoned(100)
    await alive(redis, keys, "owner")
    await owner.give_back(taken)
    (again,) = await leases_of(redis, keys, "me").abandoned(100)
    assert again.deaths == 1


async def test_what_is_kept_for_too_long_is_taken_from_the_living(redis: Redis, keys: Keys) -> None:
    (theirs,) = await held(redis, keys, "other")
    (mine,) = await held(redis, keys, "me")
    await alive(redis, keys, "me", "other")
    await asyncio.sleep(0.02)
    assert await leases_of(redis, keys, "me").abandoned(100) == []
    taken = await leases_of(redis, keys, "me", backstop_ms=10).abandoned(100)
    assert [(raw.entry_id, raw.deaths) for raw in taken] == [(theirs, 0)]
    assert await pending(redis, keys) == {theirs: ("me", 1), mine: ("me", 1)}


@pytest.mark.parametrize("owner", ["dead", "live", "me"])
async def test_what_was_deleted_while_pending_is_cleared_away(
    redis: Redis, keys: Keys, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_module, "ASTRAY_MS", 0)
    ids = await held(redis, keys, owner, 2)
    await alive(redis, keys, "live")
    await redis.xdel(keys.lane(Lane.INTERACTIVE), ids[0])
    await asyncio.sleep(0.02)
    mine = leases_of(redis, keys, "me", backstop_ms=10)
    taken = await (mine.astray() if owner == "me" else mine.abandoned(100))
    assert [raw.entry_id for raw in taken] == [ids[1]]
    assert list(await pending(redis, keys)) == [ids[1]]


async def test_two_that_look_at_once_never_take_the_same(redis: Redis, keys: Keys) -> None:
    ids = await held(redis, keys, "dead", 300)
    await alive(redis, keys, "one", "two")
    both = [leases_of(redis, keys, name) for name in ("one", "two")]
    taken = await asyncio.gather(*(one.abandoned(20) for _ in range(8) for one in both))
    places = [raw.entry_id for some in taken for raw in some]
    assert len(places) == 300
    assert set(places) == set(ids)
    assert {count for _, count in (await pending(redis, keys)).values()} == {2}


async def test_a_lane_that_is_gone_holds_nothing(redis: Redis, keys: Keys) -> None:
    await held(redis, keys, "dead", 1, Lane.BULK)
    await redis.delete(keys.lane(Lane.INTERACTIVE))
    mine = leases_of(redis, keys, "me")
    gone = RawEntry(Lane.INTERACTIVE, b"1-0", {})
    assert await mine.astray() == []
    assert [raw.lane for raw in await mine.abandoned(100)] == [Lane.BULK]
    with pytest.raises(ResponseError):  # nothing is run that was not booked
        await mine.book([gone])
    await mine.give_back([gone])


@pytest.mark.parametrize("lane", LANES)
async def test_reads_whose_reply_was_lost_are_found(
    redis: Redis, keys: Keys, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand()
    mine = leases_of(redis, keys, "me", hand=hand)
    ids = await held(redis, keys, "me", 7, lane)
    others = await held(redis, keys, "other", 1, lane)
    await alive(redis, keys, "me", "other")
    hand.take([RawEntry(lane, entry_id, {}) for entry_id in ids[:4]])
    hand.take([RawEntry(one, ids[5], {}) for one in LANES if one is not lane])  # the same id of another lane
    assert await mine.astray() == []  # their reply may still be on its way
    monkeypatch.setattr(leases_module, "ASTRAY_MS", 0)
    monkeypatch.setattr(leases_module, "PAGE", 2)  # so that whole pages hold nothing of interest
    await asyncio.sleep(0.02)
    found = await mine.astray()
    assert [(raw.lane, raw.entry_id, raw.deaths) for raw in found] == [(lane, entry_id, 0) for entry_id in ids[4:]]
    assert found[2].fields == {b"h": b"header 6", b"b": b"body"}
    assert await pending(redis, keys, lane) == dict.fromkeys(ids, ("me", 1)) | {others[0]: ("other", 1)}


async def test_suspects_whose_reply_was_lost_stay_suspects(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    await held(redis, keys, "dead")
    await leases_of(redis, keys, "me").abandoned(100)  # and the reply is lost
    monkeypatch.setattr(leases_module, "ASTRAY_MS", 0)
    await asyncio.sleep(0.02)
    (raw,) = await leases_of(redis, keys, "me").astray()
    assert raw.deaths == 1


async def test_what_was_given_back_and_taken_up_again_counts_once_more(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung consumer that goes on takes up what nobody else has taken; from there on it may die of it."""
    ids = await held(redis, keys, "me")
    mine = leases_of(redis, keys, "me")
    await mine.give_back([RawEntry(Lane.INTERACTIVE, ids[0], {})])
    (raw,) = await mine.astray()
    assert raw.deaths == 0
    (raw,) = await leases_of(redis, keys, "other").abandoned(100)
    assert raw.deaths == 1


async def test_only_what_is_still_ours_is_booked(redis: Redis, keys: Keys) -> None:
    entries = []
    for lane in LANES:
        entries += [RawEntry(lane, entry_id, {}) for entry_id in await held(redis, keys, "me", 2, lane)]
        stolen = await held(redis, keys, "thief", 1, lane)
        entries += [RawEntry(lane, stolen[0], {})]
    booked = await leases_of(redis, keys, "me").book(entries)
    assert [raw.place for raw in booked] == [raw.place for place, raw in enumerate(entries) if place % 3 != 2]
    for lane in LANES:
        assert sorted((await pending(redis, keys, lane)).values()) == [("me", 2), ("me", 2), ("thief", 1)]


async def test_it_counts_what_is_taken_over_by_reason(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> dict[str, float]:
        name = "embedstream_jobs_taken_over_total"
        reasons = ("dead", "released", "backstop", "lost_reply")
        return {reason: REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0 for reason in reasons}

    monkeypatch.setattr(leases_module, "ASTRAY_MS", 0)
    before = counted()
    await held(redis, keys, "dead", 4)
    released = await held(redis, keys, "live", 2)
    await alive(redis, keys, "live")
    await leases_of(redis, keys, "live").give_back([RawEntry(Lane.INTERACTIVE, entry_id, {}) for entry_id in released])
    await held(redis, keys, "live", 3)
    await held(redis, keys, "me", 1)
    await asyncio.sleep(0.02)
    mine = leases_of(redis, keys, "me", backstop_ms=10)
    await mine.astray()
    await mine.abandoned(100)
    after = counted()
    assert {reason: after[reason] - before[reason] for reason in after} == {
        "dead": 4,
        "released": 2,
        "backstop": 3,
        "lost_reply": 1,
    }


async def test_an_attempt_whose_booking_is_repeated_counts_once(redis: Redis, keys: Keys) -> None:
    """A server that stands still carries out later what we have given up and asked again."""
    for lane in LANES:
        await held(redis, keys, "dead", 2, lane)
    mine = leases_of(redis, keys, "me")
    taken = await mine.abandoned(100)
    for _ in range(3):
        assert await mine.book(taken) == taken
    found = await leases_of(redis, keys, "other").abandoned(100)
    assert [raw.deaths for raw in found] == [2] * 4
