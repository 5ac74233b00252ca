from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import httpx2
import pytest
from starlette.applications import Starlette
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.shared.settings import Settings

HEALTH = [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")]


@pytest.mark.parametrize(("method", "path"), HEALTH)
async def test_healthy_when_a_consumer_has_the_model(client: httpx2.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "tiny", "consumers": 1}
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("method", "path"), HEALTH)
async def test_unhealthy_with_the_reason(
    client: httpx2.AsyncClient, producer: StubProducer, method: str, path: str
) -> None:
    producer.fleet.reason = "No consumer of `tiny` is alive."
    response = await client.request(method, path)
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "No consumer of `tiny` is alive.",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert int(response.headers["retry-after"]) > 0


async def test_unhealthy_with_what_kept_a_consumer_from_serving(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    producer.fleet.reason = "No consumer has announced a model yet."
    producer.fleet.load_failure = "/models/x/config.json is damaged"
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == (
        "No consumer has announced a model yet. The last one could not serve: /models/x/config.json is damaged"
    )
    response = await client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert response.json()["error"]["message"] == "No consumer has announced a model yet."
    producer.fleet.redis_ok = False  # what was read long ago says nothing of an outage
    response = await client.get("/health")
    assert response.json()["error"]["message"] == "No consumer has announced a model yet."


async def test_unhealthy_before_anybody_announced(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.served = None
    assert (await client.get("/health")).status_code == 503


async def test_livez_is_about_the_process_alone(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.redis_ok, producer.fleet.reason, producer.fleet.consumers = False, "Redis cannot be reached.", ()
    assert (await client.get("/livez")).json() == {"status": "ok"}


async def test_ready_when_redis_and_a_consumer_are_there(client: httpx2.AsyncClient) -> None:
    response = await client.get("/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_not_ready_without_redis(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.redis_ok, producer.fleet.reason = False, "Redis cannot be reached."
    response = await client.get("/ready")
    assert (response.status_code, response.json()["error"]["message"]) == (503, "Redis cannot be reached.")


async def test_not_ready_without_a_consumer(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.consumers = ()
    assert (await client.get("/ready")).status_code == 503


async def test_ready_without_a_consumer_when_requests_may_wait_for_one(
    producer: StubProducer, connect_to: Callable[[Starlette], httpx2.AsyncClient]
) -> None:
    producer.fleet.consumers, producer.fleet.reason = (), "No consumer of `tiny` is alive."
    async with connect_to(create_app(Settings(scale_from_zero_s=30), producer)) as client:
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/health")).status_code == 503
        producer.fleet.redis_ok = False
        assert (await client.get("/ready")).status_code == 503


async def test_version(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": metadata.version("embedstream")}


async def test_probes_answer_head(client: httpx2.AsyncClient) -> None:
    assert (await client.head("/health")).status_code == 200
