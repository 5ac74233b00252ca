"""Quotas, with a real Valkey. Time passes by moving a bucket's own record of when it was last touched."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from redis.asyncio import Redis
from starlette.applications import Starlette
from tests.api.conftest import StubFleet, StubProducer, served_model

from embedstream.api import create_app
from embedstream.api.context import Caller, Context
from embedstream.api.errors import RateLimited
from embedstream.api.quota import Quota, _duration
from embedstream.shared import metrics
from embedstream.shared.connections import connect
from embedstream.shared.errors import JobFailed, Overloaded, Unavailable
from embedstream.shared.settings import Settings

URL = "/v1/embeddings"
KEYS = served_model().keys
Connect = Callable[[Starlette], httpx2.AsyncClient]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that hesitates lets no request pass unchecked."""
    monkeypatch.setattr("embedstream.api.quota._PATIENCE_S", 60)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with aclosing(connect(redis_url)) as client:
        yield client


@pytest.fixture
def producer(redis: Redis) -> StubProducer:
    producer = StubProducer(StubFleet())
    producer._redis = redis
    return producer


@pytest.fixture
def quota(producer: StubProducer) -> Quota:
    return Quota(producer, Settings())


@pytest.fixture
def caller() -> Caller:
    """A key of this test's own: a token a second, a hundred at once."""
    return Caller(uuid.uuid4().hex, None, 1.0, 100.0)


def asked(caller: Caller | None) -> Context:
    return Context("id", caller=caller)


async def left(redis: Redis, caller: Caller) -> float:
    tokens = await redis.hget(KEYS.quota(caller.name), "n")
    assert tokens is not None
    return float(tokens)


async def let_pass(redis: Redis, caller: Caller, seconds: float) -> None:
    key = KEYS.quota(caller.name)
    at = await redis.hget(key, "at")
    assert at is not None
    await redis.hset(key, "at", int(int(at) - seconds * 1_000_000))


async def test_tokens_are_taken_and_told(quota: Quota, redis: Redis, caller: Caller) -> None:
    context = asked(caller)
    await quota.charge(context, 30)
    assert context.charged_tokens == 30
    assert await left(redis, caller) == 70
    assert context.headers == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "70",
        "x-ratelimit-reset-tokens": "30s",
    }


async def test_a_used_up_quota_refuses_and_says_for_how_long(quota: Quota, redis: Redis, caller: Caller) -> None:
    await quota.charge(asked(caller), 90)
    context = asked(caller)
    with pytest.raises(RateLimited) as caught:
        await quota.charge(context, 30)
    assert 19.0 < caught.value.retry_after_s <= 20.0
    assert str(caught.value).startswith(
        f"The quota of the key `{caller.name}` is used up: 1 tokens a second, at most 100 at once. "
        "This request has 30, and 10 are left; it can be taken in "
    )
    assert (context.charged_tokens, context.headers["x-ratelimit-remaining-tokens"]) == (0, "10")
    await let_pass(redis, caller, caught.value.retry_after_s)
    await quota.charge(context, 30)


async def test_it_grows_with_time_up_to_its_burst(quota: Quota, redis: Redis, caller: Caller) -> None:
    await quota.charge(asked(caller), 100)
    await let_pass(redis, caller, 40)
    await quota.charge(asked(caller), 30)
    assert 10 <= await left(redis, caller) < 11
    await let_pass(redis, caller, 1000)
    await quota.charge(asked(caller), 0)
    assert await left(redis, caller) == 100


async def test_a_clock_that_was_set_back_gives_nothing(quota: Quota, redis: Redis, caller: Caller) -> None:
    await quota.charge(asked(caller), 100)
    await let_pass(redis, caller, -1000)
    with pytest.raises(RateLimited) as caught:
        await quota.charge(asked(caller), 1)
    assert caught.value.retry_after_s == 1  # and takes nothing


async def test_a_request_above_the_burst_passes_when_the_bucket_is_full(
    quota: Quota, redis: Redis, caller: Caller
) -> None:
    context = asked(caller)
    await quota.charge(context, 250)
    assert await left(redis, caller) == -150
    assert context.headers["x-ratelimit-remaining-tokens"] == "0"
    assert context.headers["x-ratelimit-reset-tokens"] == "4m10s"
    with pytest.raises(RateLimited) as caught:
        await quota.charge(asked(caller), 50)
    assert 199 < caught.value.retry_after_s <= 200
    await let_pass(redis, caller, 249)
    with pytest.raises(RateLimited) as caught:  # not quite full
        await quota.charge(asked(caller), 250)
    await let_pass(redis, caller, caught.value.retry_after_s)
    await quota.charge(asked(caller), 250)


async def test_the_bucket_is_one_for_all_processes_and_all_requests_at_once(
    producer: StubProducer, redis: Redis, caller: Caller
) -> None:
    quotas = [Quota(producer, Settings()) for _ in range(2)]
    outcomes = await asyncio.gather(
        *(quotas[turn % 2].charge(asked(caller), 10) for turn in range(12)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes].count(RateLimited) == 2
    assert 0 <= await left(redis, caller) < 1


async def test_the_bucket_goes_when_it_is_full(quota: Quota, redis: Redis, caller: Caller) -> None:
    await quota.charge(asked(caller), 250)
    assert 250_000 < await redis.pttl(KEYS.quota(caller.name)) <= 251_000


async def test_a_quota_that_was_lowered_counts_at_once(quota: Quota, caller: Caller) -> None:
    await quota.charge(asked(caller), 1)
    context = asked(Caller(caller.name, None, 1.0, 10.0))
    await quota.charge(context, 5)
    assert context.headers["x-ratelimit-remaining-tokens"] == "5"


async def test_without_a_caller_or_a_quota_redis_is_not_asked(
    producer: StubProducer, quota: Quota, caller: Caller
) -> None:
    del producer._redis
    await quota.charge(asked(None), 10)
    context = asked(Caller(caller.name))
    await quota.charge(context, 10)
    assert (context.charged_tokens, context.headers) == (10, {})


async def test_while_redis_is_away_requests_pass(
    producer: StubProducer, quota: Quota, redis: Redis, caller: Caller, tmp_path: Path
) -> None:
    before = metrics.QUOTA_UNCHECKED._value.get()
    async with aclosing(connect(f"unix://{tmp_path}/nothing.sock")) as nobody:
        producer._redis = nobody
        with structlog.testing.capture_logs() as logs:
            for _ in range(2):
                context = asked(caller)
                await quota.charge(context, 1000)
                assert (context.charged_tokens, context.headers) == (1000, {})
            producer._redis = redis
            await quota.charge(asked(caller), 10)
            producer.fleet.redis_ok = False
            await quota.charge(asked(caller), 1000)
    assert [line["event"] for line in logs] == ["quota.unchecked"] * 2
    assert await left(redis, caller) == 90
    assert metrics.QUOTA_UNCHECKED._value.get() == before + 3


async def test_a_redis_that_hangs_is_not_waited_for(
    producer: StubProducer, quota: Quota, redis: Redis, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedstream.api.quota._PATIENCE_S", 0.01)
    await redis.client_pause(60_000, all=False)  # as a hung one: what writes is not answered
    try:
        context = asked(caller)
        await quota.charge(context, 1000)
        assert (context.charged_tokens, context.headers) == (1000, {})
    finally:
        await redis.client_unpause()
    monkeypatch.setattr("embedstream.api.quota._PATIENCE_S", 60)
    with pytest.raises(RateLimited):  # those of the late answer were taken all the same
        await quota.charge(asked(caller), 1)


async def test_a_defect_ends_the_requests_it_meets_and_no_others(
    producer: StubProducer, quota: Quota, redis: Redis, caller: Caller
) -> None:
    del producer._redis
    with structlog.testing.capture_logs() as logs, pytest.raises(AttributeError):
        await quota.charge(asked(caller), 10)
    assert [line["event"] for line in logs] == ["quota.failed"]
    producer._redis = redis
    await quota.charge(asked(caller), 10)


async def test_all_of_a_moment_travel_in_few_calls(
    quota: Quota, redis: Redis, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = under_way = most = 0
    evalsha = redis.evalsha

    async def counted(*arguments: Any) -> Any:
        nonlocal calls, under_way, most
        calls, under_way = calls + 1, under_way + 1
        most = max(most, under_way)
        try:
            return await evalsha(*arguments)
        finally:
            under_way -= 1

    monkeypatch.setattr(redis, "evalsha", counted)
    small = Caller(uuid.uuid4().hex, None, 0.001, 3.0)
    contexts = [asked(each) for _ in range(300) for each in (caller, small)]
    outcomes = await asyncio.gather(*(quota.charge(context, 1) for context in contexts), return_exceptions=True)
    assert (calls, most) == (3, 1)
    assert [outcomes[lane::2].count(None) for lane in (0, 1)] == [100, 3]


async def test_one_that_is_given_up_does_not_disturb_the_others(quota: Quota, redis: Redis, caller: Caller) -> None:
    tasks = [asyncio.create_task(quota.charge(asked(caller), 1)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, type(None)]
    await quota.charge(asked(caller), 1)


async def test_what_was_not_taken_is_not_given_back(
    producer: StubProducer, quota: Quota, redis: Redis, caller: Caller
) -> None:
    await quota.charge(asked(caller), 90)
    context = asked(caller)
    producer.fleet.redis_ok = False
    await quota.charge(context, 90)
    producer.fleet.redis_ok = True
    await quota.settle(context, accepted=False)
    assert await left(redis, caller) == 10


async def test_metrics_tell_only_so_many_keys_apart(producer: StubProducer) -> None:
    quota = Quota(producer, Settings(key_labels=2))
    names = [uuid.uuid4().hex for _ in range(3)]
    other = metrics.KEY_TOKENS.labels("other")._value.get()
    for name in [*names, names[0]]:
        context = asked(Caller(name))
        await quota.charge(context, 5)
        await quota.settle(context, accepted=True)
    assert [metrics.KEY_TOKENS.labels(name)._value.get() for name in names[:2]] == [10, 5]
    assert metrics.KEY_TOKENS.labels("other")._value.get() == other + 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0ms"), (0.0001, "1ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s")],
        *[(3600, "1h0m0s"), (90_061.5, "25h1m1.5s")],
    ],
)
def test_durations_have_the_form_of_openai(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


# Over HTTP


@pytest.fixture
async def limited(
    producer: StubProducer, connect_to: Connect, tmp_path: Path, caller: Caller
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client whose key has ten tokens at once; `a` costs three."""
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.{caller.name}]\nkey = "k"\ntokens_per_s = 0.001\nburst_tokens = 10\n')
    async with connect_to(create_app(Settings(api_keys_file=path), producer)) as client:
        client.headers["authorization"] = "Bearer k"
        yield client


async def embed(client: httpx2.AsyncClient, text: str = "a", **fields: Any) -> httpx2.Response:
    return await client.post(URL, json={"input": text, **fields})


async def test_answers_tell_what_is_left_until_the_429(
    limited: httpx2.AsyncClient, producer: StubProducer, caller: Caller
) -> None:
    refused = metrics.QUOTA_REFUSALS.labels(caller.name)._value.get()
    for remaining in ("7", "4", "1"):
        response = await embed(limited)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-tokens"] == "10"
        assert response.headers["x-ratelimit-remaining-tokens"] == remaining
    runs = len(producer.runs)
    response = await embed(limited)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "120"  # openai's client gives up above that; the message has the truth
    assert response.headers["x-ratelimit-remaining-tokens"] == "1"
    assert response.headers["x-ratelimit-reset-tokens"].startswith("2h")
    assert "x-should-retry" not in response.headers
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("RateLimitError", None, 429)
    assert len(producer.runs) == runs
    assert metrics.QUOTA_REFUSALS.labels(caller.name)._value.get() == refused + 1
    assert metrics.KEY_TOKENS.labels(caller.name)._value.get() == 9


@pytest.mark.parametrize("encoding_format", ["float", "base64", "bytes", "bytes_only"])
async def test_every_form_is_charged(limited: httpx2.AsyncClient, encoding_format: str) -> None:
    response = await embed(limited, "a b", encoding_format=encoding_format)
    assert response.headers["x-ratelimit-remaining-tokens"] == "6"


@pytest.mark.parametrize("error", [Overloaded("x", retry_after_s=1), Unavailable("x")])
@pytest.mark.parametrize("form", ["float", "bytes_only"])
async def test_what_the_queue_refuses_is_given_back(
    limited: httpx2.AsyncClient, producer: StubProducer, redis: Redis, caller: Caller, error: Exception, form: str
) -> None:
    producer.error = error
    for _ in range(5):
        response = await embed(limited, "a b c", encoding_format=form)
        assert response.status_code in {429, 503}
        assert response.headers["x-ratelimit-remaining-tokens"] == "10"
    assert await left(redis, caller) == 10
    assert metrics.KEY_TOKENS.labels(caller.name)._value.get() == 0


async def test_what_the_device_has_worked_for_is_not(
    limited: httpx2.AsyncClient, producer: StubProducer, caller: Caller
) -> None:
    producer.error = JobFailed("x")
    assert (await embed(limited)).headers["x-ratelimit-remaining-tokens"] == "7"
    assert metrics.KEY_TOKENS.labels(caller.name)._value.get() == 3


async def test_what_is_refused_before_the_queue_costs_nothing(
    limited: httpx2.AsyncClient, redis: Redis, caller: Caller
) -> None:
    assert (await embed(limited, " ".join("abcdefgh" * 2))).status_code == 400
    assert (await embed(limited, encoding_format="confidential")).status_code == 400
    assert (await limited.get("/v1/models")).status_code == 200
    assert not await redis.exists(KEYS.quota(caller.name))
