from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx2
import pytest
from tests.api.conftest import StubProducer, announcement

from embedstream.shared.recipe import Pooling

CARD: dict[str, Any] = {
    "id": "tiny",
    "object": "model",
    "created": 1_700_000_000,
    "owned_by": "embedstream",
    "root": "tiny",
    "parent": None,
    "max_model_len": 10,
    "permission": [],
    "dimension": 8,
    "token_dimension": 8,
    "pooling": "mean",
    "pooling_source": "modules.json",
    "head": "",
    "normalize": True,
    "matryoshka_dimensions": [2, 4],
    "similarity": "cosine",
    "prompts": {},
    "default_prompt": None,
    "tasks": [],
    "default_task": None,
    "dtype": "bfloat16",
    "revision": "abc123",
    "consumers": 1,
}


async def test_one_card_for_each_name(client: httpx2.AsyncClient) -> None:
    response = await client.get("/v1/models")
    assert response.json() == {"object": "list", "data": [CARD, CARD | {"id": "owner/tiny"}]}


async def test_nothing_is_listed_before_anybody_announced(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.served, producer.fleet.consumers = None, ()
    assert (await client.get("/v1/models")).json() == {"object": "list", "data": []}
    response = await client.get("/v1/models/tiny")
    assert (response.status_code, response.json()["error"]["message"]) == (404, "The model `tiny` does not exist.")


async def test_live_consumers_are_counted(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.consumers = (announcement("c1", 30), replace(announcement("c2", 20), dtype="float32"))
    (card, _) = (await client.get("/v1/models")).json()["data"]
    assert (card["consumers"], card["created"], card["dtype"]) == (2, 20, "bfloat16")


async def test_a_model_whose_consumers_are_away_stays_listed(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    producer.fleet.consumers = ()
    (card, _) = (await client.get("/v1/models")).json()["data"]
    assert (card["consumers"], card["dtype"], card["pooling_source"]) == (0, None, None)
    assert card["created"] > 0


@pytest.mark.parametrize(("sizes", "told"), [(None, "any"), ((), []), ((4,), [4])])
async def test_sizes_clients_may_ask_for(
    client: httpx2.AsyncClient, producer: StubProducer, sizes: tuple[int, ...] | None, told: object
) -> None:
    producer.serve(matryoshka_dims=sizes)
    assert (await client.get("/v1/models/tiny")).json()["matryoshka_dimensions"] == told


async def test_what_the_recipe_says_is_told(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.serve(
        pooling=(Pooling.CLS, Pooling.MEAN),
        token_dimension=16,
        head="dense 32>8 tanh",
        similarity="dot",
        prompts={"query": "query: ", "long": "p" * 1001},
        default_prompt="query",
        adapters=("classification", "retrieval.query"),
        default_adapter="classification",
    )
    card = (await client.get("/v1/models/tiny")).json()
    expected = {
        "token_dimension": 16,
        "pooling": "cls+mean",
        "head": "dense 32>8 tanh",
        "similarity": "dot",
        "prompts": {"query": "query: ", "long": "p" * 1000 + "…"},
        "default_prompt": "query",
        "tasks": ["classification", "retrieval.query"],
        "default_task": "classification",
    }
    assert expected.items() <= card.items()


async def test_one_model_by_name(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/models/tiny")).json() == CARD
    assert (await client.get("/v1/models/owner/tiny")).json() == CARD | {"id": "owner/tiny"}
    assert (await client.get("/v1/models/owner%2Ftiny")).json() == CARD | {"id": "owner/tiny"}


async def test_an_unknown_name(client: httpx2.AsyncClient) -> None:
    response = await client.get("/v1/models/owner/other")
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (404, "NotFoundError", None)
    assert error["message"] == "The model `owner/other` does not exist. Served here: `tiny`, `owner/tiny`."
