from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import fakeredis
import pytest
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.shared.connections import connect
from embedstream.shared.errors import Unavailable, UnfitServer
from embedstream.shared.server_checks import check_server
from embedstream.shared.settings import Settings

FIT = {"redis_version": "6.2.0", "maxmemory_policy": "noeviction", "maxmemory": 5, "used_memory": 3, "aof_enabled": 1}


@pytest.fixture(scope="module")
def own_server(_own_folders: None) -> Iterator[str]:
    """A server whose configuration these tests may change."""
    with EmbeddedServer(Settings(embedded_maxmemory_bytes=64 * 1024 * 1024)) as server:
        yield server.url


@pytest.fixture
async def redis(own_server: str) -> AsyncIterator[Redis]:
    client = connect(own_server)
    yield client
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("maxmemory", 64 * 1024 * 1024)
    await client.config_set("appendonly", "no")
    await client.aclose()


class Odd:
    """A server that answers INFO and CONFIG GET as it is told to."""

    def __init__(self, info: dict[str, Any] | Exception, config: dict[Any, Any] | Exception) -> None:
        self._info, self._config = info, config
        self.asked: list[str] = []

    async def info(self) -> object:
        return self._answer("INFO", self._info)

    async def config_get(self, pattern: str) -> object:
        return self._answer(f"CONFIG GET {pattern}", self._config)

    def _answer(self, question: str, answer: object) -> object:
        self.asked.append(question)
        if isinstance(answer, Exception):
            raise answer
        return answer


def odd(info: dict[str, Any] | Exception, config: dict[Any, Any] | Exception | None = None) -> Redis:
    return cast("Redis", Odd(info, config if config is not None else AssertionError("not to be asked")))


async def test_a_good_server_has_no_warning(redis: Redis) -> None:
    await redis.config_set("appendonly", "yes")
    report = await check_server(redis)
    assert report.warnings == ()
    assert report.server.startswith(("Valkey ", "Redis "))
    assert report.maxmemory_bytes == 64 * 1024 * 1024


async def test_what_costs_safety_is_a_warning(redis: Redis) -> None:
    await redis.config_set("maxmemory", 0)
    aof, limit = (report := await check_server(redis)).warnings
    assert report.maxmemory_bytes == 0
    assert "append-only" in aof
    assert "maxmemory" in limit


async def test_an_embedded_server_is_in_memory_by_design(redis: Redis) -> None:
    assert (await check_server(redis)).warnings
    assert (await check_server(redis, embedded=True)).warnings == ()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_evicts_is_refused(redis: Redis, policy: str) -> None:
    await redis.config_set("maxmemory-policy", policy)
    with pytest.raises(UnfitServer, match=f"{policy}.*CONFIG SET maxmemory-policy noeviction") as refused:
        await check_server(redis)
    assert isinstance(refused.value, Unavailable)


async def test_a_user_without_rights_to_ask(own_server: str, redis: Redis) -> None:
    await redis.acl_setuser("narrow", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-info", "-config"])
    narrow = connect(own_server.replace("unix://", "unix://narrow:any@"))
    report = await check_server(narrow)
    await narrow.aclose()
    assert len(report.warnings) == 2
    assert report.maxmemory_bytes == 0


async def test_fakeredis_tells_nothing() -> None:
    fake = fakeredis.FakeAsyncRedis()
    version, policy = (await check_server(fake)).warnings
    assert "6.2" in version
    assert "noeviction" in policy
    await fake.aclose()


@pytest.mark.parametrize("version", ["6.0.16", "5.0", 6.0, 2])
async def test_an_old_server_is_refused(version: object) -> None:
    with pytest.raises(UnfitServer, match=rf"version {version}, and 6\.2"):
        await check_server(odd(FIT | {"redis_version": version}))


@pytest.mark.parametrize("version", ["6.2.0", 6.2, "7.0.15", "10.1.0"])
async def test_a_new_server_is_fine(version: object) -> None:
    report = await check_server(odd(FIT | {"redis_version": version}))
    assert report.server == f"Redis {version}"
    assert report.warnings == ()


async def test_valkey_names_itself() -> None:
    assert (await check_server(odd(FIT | {"valkey_version": "9.1.0"}))).server == "Valkey 9.1.0"


@pytest.mark.parametrize("config", [{"maxmemory-policy": "noeviction"}, {b"maxmemory-policy": b"noeviction"}])
async def test_config_get_is_the_fallback(config: dict[Any, Any]) -> None:
    report = await check_server(odd({"redis_version": "7.2.4"}, config))
    assert report.warnings == ()
    with pytest.raises(UnfitServer, match="allkeys-lfu"):
        await check_server(odd({"redis_version": "7.2.4"}, {"maxmemory-policy": "allkeys-lfu"}))


async def test_limits_come_from_config_get_too() -> None:
    config = {"maxmemory": "1024", "maxmemory-policy": "noeviction"}
    assert (await check_server(odd({"redis_version": "7.2.4"}, config))).maxmemory_bytes == 1024


async def test_one_question_is_enough() -> None:
    server = odd(FIT)
    await check_server(server)
    assert cast("Odd", server).asked == ["INFO"]


@pytest.mark.parametrize("error", [RedisTimeout("gone"), BusyLoadingError("loading"), ResponseError("MASTERDOWN x")])
async def test_a_server_that_cannot_be_asked_now_is_no_report(error: Exception) -> None:
    with pytest.raises(type(error)):
        await check_server(odd(error))
    with pytest.raises(type(error)):
        await check_server(odd({"redis_version": "7.2.4"}, error))
