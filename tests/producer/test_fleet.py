"""What a caller knows of the fleet, the server and the lanes, and what that means for its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from embedstream.producer import contact as contact_module
from embedstream.producer import fleet as fleet_module
from embedstream.producer.fleet import Fleet
from embedstream.shared import load_failures, metrics
from embedstream.shared.cards import CardCache, ModelCard
from embedstream.shared.connections import connect, connect_sync
from embedstream.shared.errors import Unavailable, UnfitServer
from embedstream.shared.keys import Keys, failures, models
from embedstream.shared.lanes import Lane
from embedstream.shared.server_checks import ServerReport

pytestmark = pytest.mark.integration


@pytest.fixture
def follower(redis: Redis, prefix: str, tmp_path: Path) -> Callable[..., Fleet]:
    """Makes fleets: `follower(scale_from_zero_s=5)`."""
    return lambda **options: Fleet(redis, prefix, None, CardCache(tmp_path), "here", **options)


async def without_consumers(redis: Redis, keys: Keys) -> None:
    """All of them are gone; the table of models and the card stay."""
    names: Any = await redis.zrange(keys.live, 0, -1)
    for name in names:
        await redis.delete(keys.heartbeat(name.decode()))
    await redis.delete(keys.live)


async def announce(url: str, stub_consumers: Any, keys: Keys, card: ModelCard) -> None:
    """A consumer comes and goes."""
    async with stub_consumers(url, keys) as start:
        await start(card)


async def test_without_consumers_requests_wait_only_where_that_was_asked_for(
    follower: Any, redis: Redis, redis_url: str, stub_consumers: Any, keys: Keys, card: ModelCard
) -> None:
    patient, strict = follower(scale_from_zero_s=5.0), follower()
    with pytest.raises(Unavailable, match="No consumer has announced a model yet"):
        await patient.live()  # there is no card yet
    await announce(redis_url, stub_consumers, keys, card)
    await without_consumers(redis, keys)
    assert (await patient.live()).card == card
    assert patient.trouble == "No consumer of `m` is alive."  # health still says so
    assert patient.redis_ok
    assert patient.consumers == ()
    with pytest.raises(Unavailable, match="No consumer of `m` is alive"):
        await strict.live()


async def test_why_a_consumer_could_not_serve_is_known(
    follower: Any, redis: Redis, redis_url: str, stub_consumers: Any, keys: Keys, card: ModelCard, prefix: str
) -> None:
    """Also before any has ever announced the model; and only until one does."""
    fleet = follower()
    other = Fleet(redis, prefix, "other", fleet._cache, "here")
    with closing(connect_sync(redis_url)) as client:
        load_failures.leave(client, prefix, ("m", "owner/m"), "c1", "it is damaged")
        load_failures.leave(client, prefix, ("m", "owner/m"), "c2", "it is still damaged")
        for ttl in (client.ttl(keys.status("c2")), client.ttl(failures(prefix))):
            assert 0 < ttl <= load_failures.STATUS_TTL_S
        client.hset(failures(prefix), b"\xff", "somebody else's")  # must not hide the others
        await fleet.refresh()
        await other.refresh()
        assert (fleet.load_failure, other.load_failure) == ("it is still damaged", None)
        assert load_failures.newest(client, prefix, "owner/m") == "it is still damaged"
        async with stub_consumers(redis_url, keys) as start:
            await start(card)
            load_failures.leave(client, prefix, ("m",), "c3", "no memory")
            await fleet.refresh()
            assert (fleet.load_failure, fleet.trouble) == (None, None)  # others serve
        await without_consumers(redis, keys)
        await fleet.refresh()
        assert fleet.load_failure == "no memory"
        async with stub_consumers(redis_url, keys) as start:
            await start(card)
        await without_consumers(redis, keys)
        await fleet.refresh()
        assert (fleet.load_failure, fleet.trouble) == (None, "No consumer of `m` is alive.")
        load_failures.leave(client, prefix, ("m",), "c4", "gone by now")
        client.delete(keys.status("c4"))  # it expires
        await fleet.refresh()
        assert fleet.load_failure is None


async def test_reasons_that_have_expired_do_not_hide_the_last(
    follower: Any, redis: Redis, redis_url: str, prefix: str
) -> None:
    fleet = follower()
    with closing(connect_sync(redis_url)) as client:
        for name in "abcde":
            load_failures.leave(client, prefix, (name,), "c", f"{name} is damaged")
            if name != "e":
                client.delete(Keys(prefix, name).status("c"))
    await fleet.refresh()
    assert fleet.load_failure == "e is damaged"


async def test_a_failure_is_not_why_one_of_several_models_must_be_named(
    follower: Any, redis_url: str, stub_consumers: Any, keys: Keys, card: ModelCard, prefix: str
) -> None:
    fleet = follower()
    async with (
        stub_consumers(redis_url, keys) as start,
        stub_consumers(redis_url, Keys(prefix, "n")) as start_another,
    ):
        await start(card)
        await start_another(replace(card, model="n"))
        with closing(connect_sync(redis_url)) as client:
            load_failures.leave(client, prefix, ("third",), "c1", "it is damaged")
        await fleet.refresh()
    assert "Several models are served" in str(fleet.trouble)
    assert fleet.load_failure is None


async def test_patience_with_consumers_is_little_with_redis(
    redis_url: str,
    stub_consumers: Any,
    keys: Keys,
    card: ModelCard,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await announce(redis_url, stub_consumers, keys, card)
    client = connect(redis_url)
    fleet = Fleet(client, prefix, None, CardCache(tmp_path), "here", scale_from_zero_s=5.0)
    await fleet.live()

    async def gone() -> None:
        raise RedisTimeoutError("silent")

    fleet._refresh = gone  # type: ignore[method-assign] # as if Redis were away
    await fleet.refresh()
    assert (await fleet.live()).keys == keys  # one lost reply is no news
    monkeypatch.setattr(contact_module, "GRACE_S", 0.0)
    await fleet.refresh()
    with pytest.raises(Unavailable, match="Redis cannot be reached"):
        await fleet.live()
    await client.aclose()


async def test_nobody_waits_longer_than_promised(follower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_PATIENCE_S", 0.05)
    fleet, answer = follower(), asyncio.Event()
    fleet._refresh = answer.wait
    with pytest.raises(Unavailable, match="Redis does not answer"):
        async with asyncio.timeout(20):
            await fleet.live()
    answer.set()
    await fleet.refresh()


async def test_an_unfit_server_is_the_trouble(follower: Any, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Any] = [UnfitServer("It evicts."), ServerReport(maxmemory_bytes=1000, warnings=("No AOF.",))]
    asked = 0

    async def check(_: Redis, *, embedded: bool) -> ServerReport:
        nonlocal asked
        assert not embedded
        asked += 1
        report = reports[min(asked - 1, 1)]
        if isinstance(report, Exception):
            raise report
        assert isinstance(report, ServerReport)
        return report

    monkeypatch.setattr(fleet_module, "check_server", check)
    fleet = follower()
    await fleet.refresh()
    assert fleet.trouble == "It evicts."
    assert not fleet.redis_ok
    await fleet.live()  # it was mended
    await fleet.refresh()
    assert asked == 2  # not asked at every poll
    admission = fleet.admission((await fleet.live()).keys)
    assert admission.lane_limit_bytes(Lane.INTERACTIVE) == 200
    await fleet._guarded(failing(), fleet._lanes_contact)
    await fleet.refresh()
    assert asked == 3  # another server may have answered


async def test_what_a_server_lacks_is_told_once_and_not_as_a_warning(follower: Any) -> None:
    fleet = follower()
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            await fleet.refresh()
            fleet._server_checked = False  # another server may answer
    (line,) = [line for line in logs if line["event"] == "fleet.server"]
    assert line["log_level"] == "info"
    assert "append-only" in line["warning"]


async def failing() -> None:
    raise RedisTimeoutError("silent")


async def test_the_lanes_are_followed(follower: Any, stub: Any, redis: Redis, keys: Keys) -> None:
    fleet, lost = follower(), asyncio.Event()
    await fleet.live()
    assert metrics.LIVE_CONSUMERS._value.get() == 1
    admission = fleet.admission(keys, lost)
    assert fleet.admission(keys) is admission
    admission.tokens_per_s = 100.0
    await without_group(redis, keys)
    await redis.hset(keys.totals, mapping={"b:jobs": 10, "b:tokens": 1000, "b:bytes": 5000})
    await redis.xadd(keys.dead_letters, {"why": "stub"})
    await fleet._sample()
    assert admission.wait_s(Lane.BULK) == 2.0  # two of ten jobs are there
    assert metrics.DEAD_LETTERS_KEPT._value.get() == 1
    assert not lost.is_set()
    await redis.delete(keys.totals)
    await fleet._sample()
    assert lost.is_set()


async def without_group(redis: Redis, keys: Keys) -> None:
    """Two bulk jobs that the stub does not take."""
    await redis.delete(keys.lane(Lane.BULK))
    for _ in range(2):
        await redis.xadd(keys.lane(Lane.BULK), {"h": b"h", "b": b"b", "rt": b""})


async def test_what_nobody_mends_by_waiting_is_told_at_once(
    follower: Any, stub: Any, redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    """That the lanes can be looked at says nothing of the table of models, and must not excuse it."""
    fleet = follower()
    await fleet.live()
    await redis.delete(models(keys.prefix))
    await redis.set(models(keys.prefix), "no table")
    for _ in range(2):
        await fleet.refresh()
        await fleet._guarded(fleet._sample(), fleet._lanes_contact)
    assert "What consumers announce cannot be read: WRONGTYPE" in fleet.trouble
    assert not fleet.redis_ok
    assert sum("fleet.redis_refuses" in line for line in caplog.messages) == 1
    with pytest.raises(Unavailable, match="WRONGTYPE"):
        await fleet.live()


async def test_lanes_that_cannot_be_looked_at_are_a_trouble_until_they_can(
    follower: Any, stub: Any, redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    """Else requests would be admitted for ever by what once was on the lanes."""
    fleet, stopping = follower(), asyncio.Event()
    await fleet.live()
    await redis.delete(keys.totals)
    await redis.set(keys.totals, "no hash")
    polling = asyncio.create_task(fleet.run(stopping))
    async with asyncio.timeout(20):
        while fleet.trouble is None:
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match=r"What is on the lanes cannot be read: .*WRONGTYPE"):
        await fleet.live()
    assert sum("fleet.redis_refuses" in line for line in caplog.messages) == 1
    await redis.delete(keys.totals)
    await fleet.live()  # it was mended, and the question is asked at once
    stopping.set()
    await polling


async def test_a_caller_with_little_time_waits_no_longer(follower: Any) -> None:
    fleet, answer = follower(), asyncio.Event()
    fleet._refresh = answer.wait
    started_s = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable, match="Redis does not answer"):
        await fleet.live(0.05)
    assert asyncio.get_running_loop().time() - started_s < fleet_module._PATIENCE_S
    answer.set()
