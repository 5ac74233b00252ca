"""The API while no consumer has ever announced its model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import numpy as np
import pytest
from redis.asyncio import Redis
from tests.api.conftest import connect as connect_to_app
from tests.producer.conftest import stub_consumers

from embedstream.api import create_app
from embedstream.producer import Lane, Producer
from embedstream.shared import results
from embedstream.shared.cards import ModelCard
from embedstream.shared.connections import connect
from embedstream.shared.keys import Keys
from embedstream.shared.recipe import NO_PROMPT, Pooling, Recipe
from embedstream.shared.results import Status
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

URL = "/v1/embeddings"


@pytest.fixture
def patient(redis_url: str, prefix: str) -> Settings:
    return Settings(
        redis_url=redis_url, key_prefix=prefix, scale_from_zero_s=30, served_model_name=("m", "alias"), api_key=()
    )


async def queued(redis: Redis, keys: Keys) -> None:
    async with asyncio.timeout(20):
        while not await redis.xlen(keys.lane(Lane.INTERACTIVE)):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("form", ["float", "bytes"])
async def test_a_request_waits_and_tells_what_the_consumer_knows(
    patient: Settings, keys: Keys, redis_url: str, wordpiece_json: str, form: str
) -> None:
    recipe = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=1000, matryoshka_dims=None)
    card = ModelCard("m", recipe, wordpiece_json, "r")
    redis = connect(redis_url)
    async with (
        Producer(settings=patient, model=patient.chosen_model) as producer,
        connect_to_app(create_app(patient, producer)) as client,
        stub_consumers(redis_url, keys) as start,
    ):
        body: dict[str, Any] = {"input": ["the queue", "a"], "model": "alias", "encoding_format": form}
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/health")).status_code == 503
        waiting = asyncio.create_task(client.post(URL, json=body))
        await queued(redis, keys)
        await start(card)
        response = await waiting
        assert response.status_code == 200, response.text
        known = await client.post(URL, json=body)
    await redis.aclose()
    if form == "bytes":
        assert response.content == known.content
        assert len(response.content) == 2 * 4 * 4
        told = json.loads(response.headers["metadata"])
        assert told["data"] == json.loads(known.headers["metadata"])["data"]
        assert told["usage"]["prompt_tokens"] == 4 + 3
    else:
        assert response.json()["usage"] == known.json()["usage"]
        assert response.json()["data"] == known.json()["data"]
        assert np.array(response.json()["data"][0]["embedding"]).shape == (4,)


async def test_what_can_be_refused_is(patient: Settings) -> None:
    async with (
        Producer(settings=patient, model=patient.chosen_model) as producer,
        connect_to_app(create_app(patient, producer)) as client,
    ):
        unknown = await client.post(URL, json={"input": "a", "model": "other"})
        ids = await client.post(URL, json={"input": [1, 2]})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
    assert "`m`, `alias`" in unknown.json()["error"]["message"]
    assert ids.status_code == 503
    assert "send texts" in ids.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "prompt", "adapter"),
    [
        ({}, "", ""),
        ({"prompt_name": ""}, NO_PROMPT, ""),
        ({"prompt_name": "query", "task": "sorting"}, "query", "sorting"),
        ({"input_type": "document"}, "role:document", ""),
    ],
)
async def test_names_go_to_the_consumer_as_they_are(
    patient: Settings,
    keys: Keys,
    redis_url: str,
    wordpiece_json: str,
    fields: dict[str, str],
    prompt: str,
    adapter: str,
) -> None:
    recipe = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=1000, matryoshka_dims=None)
    redis = connect(redis_url)
    async with (
        Producer(settings=patient, model=patient.chosen_model) as producer,
        connect_to_app(create_app(patient, producer)) as client,
        stub_consumers(redis_url, keys) as start,
    ):
        waiting: asyncio.Task[httpx2.Response] = asyncio.create_task(client.post(URL, json={"input": "a", **fields}))
        await queued(redis, keys)
        stub = await start(ModelCard("m", recipe, wordpiece_json, "r"))
        assert (await waiting).status_code == 200
    await redis.aclose()
    (job,) = stub.seen
    assert (job.prompt_name, job.adapter) == (prompt, adapter)


async def test_names_that_no_model_has_are_refused(patient: Settings) -> None:
    async with (
        Producer(settings=patient, model=patient.chosen_model) as producer,
        connect_to_app(create_app(patient, producer)) as client,
    ):
        for field in ("prompt_name", "input_type", "task"):
            response = await client.post(URL, json={"input": "a", field: "x" * 10_000_000})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field)
            assert len(error["message"]) < 200
        both = await client.post(URL, json={"input": "a", "prompt_name": "query", "input_type": "query"})
        assert (both.status_code, both.headers["retry-after"]) == (503, "2")


async def test_length_errors_come_as_answers(
    patient: Settings, keys: Keys, redis_url: str, wordpiece_json: str
) -> None:
    recipe = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=1000, matryoshka_dims=None)
    redis = connect(redis_url)

    def too_long(job: Any, parts: Any) -> Any:
        print_ = parts[0].fingerprint
        return [results.failed(job.request_id, print_, 0, 1, 0, 1, Status.INPUT_TOO_LONG, "maximum context length")]

    async with (
        Producer(settings=patient, model=patient.chosen_model) as producer,
        connect_to_app(create_app(patient, producer)) as client,
        stub_consumers(redis_url, keys) as start,
    ):
        waiting: asyncio.Task[httpx2.Response] = asyncio.create_task(client.post(URL, json={"input": "a"}))
        await queued(redis, keys)
        (await start(ModelCard("m", recipe, wordpiece_json, "r"))).on_job = too_long
        response = await waiting
    await redis.aclose()
    assert (response.status_code, response.json()["error"]["message"]) == (400, "maximum context length")
