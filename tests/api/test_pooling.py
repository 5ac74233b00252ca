from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.applications import Starlette
from tests.api.conftest import DIM, StubProducer
from tests.api.test_chat import USER, serve_chat

from embedstream.api import create_app
from embedstream.shared.recipe import Pooling
from embedstream.shared.settings import Settings

INPUTS = ["a", "b c d", "e f"]
LENGTHS = [3, 5, 4]


async def pooled(client: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/pooling", json={"input": INPUTS} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refused(client: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/pooling", json={"input": "a"} | body)
    error: dict[str, Any] = response.json()["error"]
    assert response.status_code == error["code"]
    return error


async def test_one_vector_for_each_input_by_default(client: httpx2.AsyncClient) -> None:
    embeddings = (await client.post("/v1/embeddings", json={"input": INPUTS})).json()
    for body in ({}, {"task": "embed"}, {"task": None}):
        answer = await pooled(client, **body)
        assert answer["id"].startswith("pooling-")
        assert answer["object"] == "list"
        assert [(item["index"], item["object"]) for item in answer["data"]] == [(i, "pooling") for i in range(3)]
        assert [item["data"] for item in answer["data"]] == [item["embedding"] for item in embeddings["data"]]
        assert answer["usage"] == embeddings["usage"]


async def test_one_vector_for_each_token(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    answer = await pooled(client, task="token_embed", request_id="mine")
    assert producer.runs[-1].options.vectors.per_token
    assert answer["id"] == "pooling-mine"
    matrices = [np.array(item["data"], np.float32) for item in answer["data"]]
    assert [matrix.shape for matrix in matrices] == [(length, DIM) for length in LENGTHS]
    assert answer["usage"]["prompt_tokens"] == sum(LENGTHS)

    packed = await pooled(client, task="token_embed", encoding_format="base64", embed_dtype="float16")
    for item, matrix in zip(packed["data"], matrices, strict=True):
        halves = np.frombuffer(base64.b64decode(item["data"]), "<f2").reshape(-1, DIM)
        np.testing.assert_array_equal(halves, matrix.astype("<f2"))


@pytest.mark.parametrize("form", ["bytes", "bytes_only"])
async def test_matrices_as_bytes(client: httpx2.AsyncClient, form: str) -> None:
    matrices = [np.array(item["data"], np.float32) for item in (await pooled(client, task="token_embed"))["data"]]
    body = {"input": INPUTS, "task": "token_embed", "encoding_format": form, "endianness": "big"}
    response = await client.post("/pooling", json=body)
    assert response.headers["content-type"] == "application/octet-stream"
    np.testing.assert_array_equal(np.frombuffer(response.content, ">f4").reshape(-1, DIM), np.concatenate(matrices))
    if form == "bytes_only":
        assert "metadata" not in response.headers
        return
    told = json.loads(response.headers["metadata"])
    assert told["id"].startswith("pooling-")
    assert [entry["shape"] for entry in told["data"]] == [[length, DIM] for length in LENGTHS]
    for entry, matrix in zip(told["data"], matrices, strict=True):
        part = np.frombuffer(response.content[entry["start"] : entry["end"]], ">f4").reshape(entry["shape"])
        np.testing.assert_array_equal(part, matrix)


@pytest.mark.parametrize("task", [None, "token_embed"])
async def test_a_model_served_with_pooling_all(
    client: httpx2.AsyncClient, producer: StubProducer, task: str | None
) -> None:
    producer.serve(pooling=(Pooling.ALL,))
    answer = await pooled(client, task=task)
    assert [len(item["data"]) for item in answer["data"]] == LENGTHS
    error = await refused(client, task="embed")
    assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", "task")
    assert error["message"].startswith("Unsupported task: 'embed' Supported tasks: ('token_embed',)")


@pytest.mark.parametrize("task", ["classify", "token_classify", "plugin"])
async def test_tasks_that_no_embedding_model_has(client: httpx2.AsyncClient, task: str) -> None:
    error = await refused(client, task=task)
    assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", "task")
    assert error["message"].startswith(f"Unsupported task: '{task}' Supported tasks: ('embed', 'token_embed')")


async def test_an_unknown_task(client: httpx2.AsyncClient) -> None:
    error = await refused(client, task="score")
    assert (error["code"], error["type"], error["param"]) == (400, "Bad Request", "body.task")
    assert "literal_error" in error["message"]


@pytest.mark.parametrize("dimensions", [2, DIM])
async def test_sizes_cannot_be_chosen(client: httpx2.AsyncClient, dimensions: int) -> None:
    error = await refused(client, dimensions=dimensions)
    assert (error["code"], error["message"], error["param"]) == (
        *(400, "dimensions is currently not supported"),
        "dimensions",
    )


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("values", [1000, 10_000])  # the larger one is read in a thread
async def test_a_body_of_too_many_values(
    producer: StubProducer, connect_to: Callable[[Starlette], httpx2.AsyncClient], path: str, values: int
) -> None:
    async with connect_to(create_app(Settings(max_body_values=1000), producer)) as client:
        response = await client.post(path, json={"unknown": [[]] * values})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "BadRequestError")
    assert "more than 1000 values (--max-body-values)" in error["message"]


async def test_what_it_shares_with_embeddings(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    assert (await refused(client, model="other"))["code"] == 404
    assert (await refused(client, input=[]))["code"] == 400
    assert (await refused(client, encoding_format="bad"))["param"] == "body.encoding_format"
    assert (await refused(client, input=["a"] * 2049))["code"] == 400
    assert (await refused(client, messages=[USER], input=None))["code"] == 400
    serve_chat(producer)
    answer = await pooled(client, input=None, messages=[USER], task="token_embed")
    assert [len(item["data"]) for item in answer["data"]] == [2]
    response = await client.post("/pooling", json={"input": "a b c d e f g h a b c", "truncate_prompt_tokens": 4})
    assert response.headers["x-truncated-inputs"] == "1"
