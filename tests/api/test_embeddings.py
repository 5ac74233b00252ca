from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import httpx2
import ml_dtypes
import numpy as np
import pytest
from starlette.applications import Starlette
from tests.api.conftest import DIM, RECIPE, StubProducer, served_model, vectors_of

from embedstream.api import create_app
from embedstream.api.schemas import EmbedDtype, Endianness
from embedstream.producer import VectorType
from embedstream.shared.errors import StaleCard
from embedstream.shared.recipe import Pooling
from embedstream.shared.settings import Settings

URL = "/v1/embeddings"
Connect = Callable[[Starlette], httpx2.AsyncClient]


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == response.status_code
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_texts_become_vectors(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    response = await client.post(URL, json={"input": ["a b", "c"]}, headers={"x-request-id": "mine"})
    assert response.status_code == 200
    body = response.json()
    assert (body["id"], body["object"], body["model"]) == ("embd-mine", "list", "tiny")
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 4 + 3
    assert [item["index"] for item in body["data"]] == [0, 1]
    np.testing.assert_array_equal(
        np.array([item["embedding"] for item in body["data"]], np.float32), vectors_of(producer.runs[0])
    )


async def test_the_id_is_made_when_none_is_given(client: httpx2.AsyncClient) -> None:
    response = await client.post(URL, json={"input": "a"})
    name = response.json()["id"].removeprefix("embd-")
    assert len(name) == 16
    assert int(name, 16) >= 0
    assert response.headers["x-request-id"] == name


@pytest.mark.parametrize(
    ("given", "ids", "lengths"),
    [
        ("a b", [0, 3, 4, 1], [4]),
        (["a", "b"], [0, 3, 1, 0, 4, 1], [3, 3]),
        ([3, 4], [3, 4], [2]),  # token ids get no special tokens
        ([[3], [4, 5]], [3, 4, 5], [1, 2]),
    ],
)
async def test_input_forms(
    client: httpx2.AsyncClient, producer: StubProducer, given: object, ids: list[int], lengths: list[int]
) -> None:
    response = await client.post(URL, json={"input": given})
    assert response.status_code == 200
    tokens = producer.runs[0].tokens
    assert (tokens.ids.tolist(), tokens.lengths.tolist()) == (ids, lengths)


async def test_options_reach_the_producer(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    body = {
        "input": "a b c d e f g h",
        "dimensions": 4,
        "normalize": False,
        "truncate_prompt_tokens": 3,
        "add_special_tokens": False,
        "embed_dtype": "bfloat16",
        "encoding_format": "base64",
    }
    response = await client.post(URL, json=body)
    assert response.status_code == 200
    prepared = producer.runs[0]
    vectors = prepared.options.vectors
    assert (vectors.dimensions, vectors.normalize, vectors.dtype) == (4, False, VectorType.BFLOAT16)
    assert prepared.tokens.ids.tolist() == [3, 4, 5]
    assert len(base64.b64decode(response.json()["data"][0]["embedding"])) == 4 * 2


async def test_floats_ignore_dtype_and_order(client: httpx2.AsyncClient) -> None:
    plain = await client.post(URL, json={"input": "a b"})
    other = await client.post(URL, json={"input": "a b", "embed_dtype": "fp8_e5m2", "endianness": "big"})
    assert other.json()["data"] == plain.json()["data"]


@pytest.mark.parametrize("dtype", get_args(EmbedDtype))
@pytest.mark.parametrize("endianness", get_args(Endianness))
async def test_binary_forms_hold_the_same_vectors(
    client: httpx2.AsyncClient, producer: StubProducer, dtype: str, endianness: str
) -> None:
    body = {"input": ["a b", "c", "d"], "embed_dtype": dtype, "endianness": endianness}
    as_bytes = await client.post(URL, json=body | {"encoding_format": "bytes"})
    as_bytes_only = await client.post(URL, json=body | {"encoding_format": "bytes_only"})
    as_base64 = await client.post(URL, json=body | {"encoding_format": "base64"})

    expected = vectors_of(producer.runs[0])
    words = expected.view(f"u{expected.itemsize}")
    assert as_bytes.content == (words.byteswap() if endianness == "big" else words).tobytes()
    assert as_bytes_only.content == as_bytes.content
    assert b"".join(base64.b64decode(item["embedding"]) for item in as_base64.json()["data"]) == as_bytes.content

    assert as_bytes.headers["content-type"] == "application/octet-stream"
    assert int(as_bytes.headers["content-length"]) == len(as_bytes.content)
    assert "metadata" not in as_bytes_only.headers
    meta = json.loads(as_bytes.headers["metadata"])
    assert (meta["id"], meta["model"]) == (f"embd-{as_bytes.headers['x-request-id']}", "tiny")
    assert meta["usage"] == {"prompt_tokens": 10, "total_tokens": 10}
    for row, item in zip(expected, meta["data"], strict=True):
        assert (item["embed_dtype"], item["endianness"], item["shape"]) == (dtype, endianness, [DIM])
        piece = np.frombuffer(as_bytes.content[item["start"] : item["end"]], words.dtype)
        assert (piece.byteswap() if endianness == "big" else piece).tobytes() == row.tobytes()


async def test_bfloat16_is_what_clients_decode(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    response = await client.post(URL, json={"input": "a", "embed_dtype": "bfloat16", "encoding_format": "bytes_only"})
    decoded = np.frombuffer(response.content, ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(decoded, vectors_of(producer.runs[0]).astype(np.float32)[0])


async def test_success_says_where_the_time_went(client: httpx2.AsyncClient) -> None:
    response = await client.post(URL, json={"input": ["a b c d e f g h", "a"], "truncate_prompt_tokens": 4})
    headers = response.headers
    assert (headers["x-queue-time-ms"], headers["x-inference-time-ms"]) == ("1.5", "2.5")
    assert float(headers["x-total-time-ms"]) >= 0
    assert headers["x-compute-tokens"] == "7"
    assert headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize("name", ["tiny", "owner/tiny", "", None])
async def test_all_served_names_are_answered_with_the_first(client: httpx2.AsyncClient, name: str | None) -> None:
    response = await client.post(URL, json={"input": "a", "model": name})
    assert response.json()["model"] == "tiny"


async def test_an_unknown_model_is_named_beside_those_served(client: httpx2.AsyncClient) -> None:
    error = error_of(await client.post(URL, json={"input": "a", "model": "gpt-9"}))
    assert error["message"] == "The model `gpt-9` does not exist. Served here: `tiny`, `owner/tiny`."
    assert (error["code"], error["type"], error["param"]) == (404, "NotFoundError", None)


@pytest.mark.parametrize(
    ("body", "code", "words", "param"),
    [
        ({"input": []}, 400, "You must pass at least one prompt", "input"),
        ({"input": [[]]}, 400, "The decoder prompt cannot be empty", "input"),
        ({"input": "", "add_special_tokens": False}, 400, "The decoder prompt cannot be empty", "input"),
        ({"input": "a b c d e f g h a"}, 400, "maximum context length is 10 tokens", "input_tokens"),
        ({"input": [1] * 11}, 400, "maximum context length is 10 tokens", "input_tokens"),
        ({"input": "a", "dimensions": 3}, 400, r"Matryoshka dimensions [2, 4], got 3", "dimensions"),
        ({"input": "a", "dimensions": 0}, 400, r"in range [1, 8], got 0", "dimensions"),
        ({"input": [11]}, 400, "Token id 11 is out of vocabulary", "input"),
        ({"input": [-1]}, 400, "Token id -1 is out of vocabulary", "input"),
        ({"input": [2**63]}, 400, "not an integer of at most 64 bits", "input"),
        ({"input": "a", "truncate_prompt_tokens": 11}, 400, "greater than max_model_len", "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 0}, 400, "at least 3", "truncate_prompt_tokens"),
    ],
)
async def test_what_cannot_be_embedded_is_refused(
    client: httpx2.AsyncClient, producer: StubProducer, body: dict[str, Any], code: int, words: str, param: str
) -> None:
    response = await client.post(URL, json=body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (code, "BadRequestError", param)
    assert words in error["message"]
    assert producer.runs == []


@pytest.mark.parametrize("exact", [{"input": "a b c d e f g h"}, {"input": [1] * 10}, {"input": "a", "dimensions": 8}])
async def test_the_limit_itself_is_allowed(client: httpx2.AsyncClient, exact: dict[str, Any]) -> None:
    assert (await client.post(URL, json=exact)).status_code == 200


async def test_checks_come_in_the_order_of_the_contract(client: httpx2.AsyncClient) -> None:
    body: dict[str, Any] = {
        "input": ["a b c d e f g h a", ""],
        "encoding_format": "bad",
        "model": "other",
        "truncate_prompt_tokens": 99,
        "dimensions": 3,
        "add_special_tokens": False,
    }
    repairs: list[tuple[str | None, dict[str, Any]]] = [
        ("body.encoding_format", {"encoding_format": "float"}),
        (None, {"model": "tiny"}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": None, "input": ["a " * 11, ""]}),
        ("input_tokens", {"input": ["a", ""]}),
        ("dimensions", {"dimensions": None}),
        ("input", {"input": "a"}),
    ]
    for param, repair in repairs:
        assert error_of(await client.post(URL, json=body))["param"] == param
        body |= repair
    assert (await client.post(URL, json=body)).status_code == 200


async def test_too_many_inputs_are_refused_before_they_are_tokenised(
    producer: StubProducer, connect_to: Connect
) -> None:
    async with connect_to(create_app(Settings(max_request_inputs=2), producer)) as client:
        error = error_of(await client.post(URL, json={"input": ["a", "b", "c"]}))
        assert error["message"].startswith("A request may have at most 2 inputs (--max-request-inputs), this one has 3")
        assert (error["code"], error["param"], producer.tokenised) == (400, "input", [])
        assert (await client.post(URL, json={"input": ["a", "b"]})).status_code == 200


async def test_too_many_tokens_are_refused(producer: StubProducer, connect_to: Connect) -> None:
    async with connect_to(create_app(Settings(max_request_tokens=6), producer)) as client:
        error = error_of(await client.post(URL, json={"input": ["a", "b c"]}))
        assert "at most 6 tokens (--max-request-tokens), this one has 7" in error["message"]
        assert producer.runs == []
        assert (await client.post(URL, json={"input": ["a", "b"]})).status_code == 200


async def test_auto_truncate(producer: StubProducer, connect_to: Connect) -> None:
    async with connect_to(create_app(Settings(auto_truncate=True), producer)) as client:
        response = await client.post(URL, json={"input": "a b c d e f g h a a"})
    assert response.headers["x-truncated-inputs"] == "1"
    assert response.json()["usage"]["prompt_tokens"] == 10


async def test_a_model_with_one_vector_for_each_token_is_no_embedding_model(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    producer.serve(pooling=(Pooling.ALL,))
    response = await client.post(URL, json={"input": "a"})
    error = error_of(response)
    assert (error["code"], error["type"]) == (501, "NotImplementedError")
    assert "/pooling" in error["message"]
    assert response.headers["x-should-retry"] == "false"


async def test_without_a_consumer_the_answer_is_503(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.reason = "No consumer of `tiny` is alive."
    response = await client.post(URL, json={"input": "a"})
    error = error_of(response)
    assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
    assert error["message"] == "No consumer of `tiny` is alive."
    assert response.headers["retry-after"] == "2"
    assert (await client.post(URL, json={"input": "a", "model": "other"})).status_code == 404  # waiting is no help
    producer.fleet.served = None
    assert (await client.post(URL, json={"input": "a", "model": "other"})).status_code == 503  # who knows


async def test_metadata_header_past_its_limit(producer: StubProducer, connect_to: Connect) -> None:
    body = {"input": ["a"] * 12, "encoding_format": "bytes"}
    headers = {"x-request-id": "0123456789abcdef"}
    async with connect_to(create_app(Settings(), producer)) as client:
        size = len((await client.post(URL, json=body, headers=headers)).headers["metadata"])
    async with connect_to(create_app(Settings(metadata_limit_bytes=size), producer)) as client:
        assert (await client.post(URL, json=body, headers=headers)).status_code == 200
    producer.runs.clear()
    async with connect_to(create_app(Settings(metadata_limit_bytes=size - 1), producer)) as client:
        error = error_of(await client.post(URL, json=body, headers=headers))
        assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", "encoding_format")
        assert f"has {size} bytes, more than the limit of {size - 1}" in error["message"]
        assert "`bytes_only`" in error["message"]
        assert "`x-metadata: omit`" in error["message"]
        assert producer.runs == []

        omitted = await client.post(URL, json=body, headers={"x-metadata": "omit"})
        assert omitted.status_code == 200
        assert "metadata" not in omitted.headers
        assert omitted.content == vectors_of(producer.runs[0]).tobytes()


async def test_a_model_replaced_meanwhile_is_described_as_it_is(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    producer.moved_to = served_model(replace(RECIPE, dimension=4))
    response = await client.post(URL, json={"input": ["a", "b"], "encoding_format": "bytes"})
    assert [item["shape"] for item in json.loads(response.headers["metadata"])["data"]] == [[4], [4]]
    assert len(response.content) == 2 * 4 * 4


async def test_a_stale_card(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.error = StaleCard("The ids were made for another revision")
    response = await client.post(URL, json={"input": [3, 4]})
    error = error_of(response)
    assert (error["code"], error["type"]) == (409, "ConflictError")
    assert "Tokenize the input again" in error["message"]
    assert response.headers["x-should-retry"] == "false"

    response = await client.post(URL, json={"input": "a"})  # its ids were ours: there is nothing to mend
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


async def test_a_vector_that_is_not_finite_is_an_error(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.spoil = lambda vectors: np.full_like(vectors, np.nan)
    assert error_of(await client.post(URL, json={"input": "a"}))["code"] == 500


async def test_bad_bodies_are_400_with_a_place(client: httpx2.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    error = error_of(await client.post(URL, content=b"{", headers=headers))
    assert (error["code"], error["type"], error["param"]) == (400, "Bad Request", "body")
    error = error_of(await client.post(URL, json={"input": "a", "encoding_format": "bad"}))
    assert (error["type"], error["param"]) == ("Bad Request", "body.encoding_format")
    assert "literal_error" in error["message"]
    assert "'bad'" in error["message"]
    error = error_of(await client.post(URL, content=b"input=a"))
    assert (error["code"], error["type"], error["param"]) == (400, "Bad Request", None)


async def test_the_lifespan_opens_and_closes_the_producer(app: Starlette, producer: StubProducer) -> None:
    async with app.router.lifespan_context(app):
        assert (producer.opened, producer.closed) == (1, 0)
    assert (producer.opened, producer.closed) == (1, 1)
