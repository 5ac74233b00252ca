from __future__ import annotations

from typing import Any

import httpx2
import pytest
import structlog
from starlette.datastructures import Headers
from tests.api.conftest import StubProducer

from embedstream.api.choices import lane_of
from embedstream.api.context import Caller
from embedstream.api.errors import LaneForbidden
from embedstream.producer import InputFailure, Lane
from embedstream.shared.errors import InvalidInput
from embedstream.shared.results import Status

URL = "/v1/embeddings"
FREE, INTERACTIVE, BULK = Caller("k"), Caller("k", Lane.INTERACTIVE), Caller("k", Lane.BULK)


@pytest.mark.parametrize(
    ("asked", "caller", "lane"),
    [
        (None, None, Lane.INTERACTIVE),
        ("bulk", None, Lane.BULK),
        (" Interactive ", None, Lane.INTERACTIVE),
        (None, FREE, Lane.INTERACTIVE),
        ("bulk", FREE, Lane.BULK),
        (None, BULK, Lane.BULK),
        ("bulk", BULK, Lane.BULK),
        (None, INTERACTIVE, Lane.INTERACTIVE),
        ("bulk", INTERACTIVE, Lane.BULK),  # less than it may have
    ],
)
def test_the_lane_of_a_request(asked: str | None, caller: Caller | None, lane: Lane) -> None:
    assert lane_of(Headers({} if asked is None else {"x-lane": asked}), caller) is lane


def test_a_key_bound_to_bulk_gets_no_better_lane() -> None:
    with pytest.raises(LaneForbidden, match="bound to the lane `bulk`"):
        lane_of(Headers({"x-lane": "interactive"}), BULK)


@pytest.mark.parametrize("asked", ["", "fast", "bulk,interactive", "x" * 1000])
def test_an_unknown_lane_is_answered_with_those_there_are(asked: str) -> None:
    with pytest.raises(InvalidInput, match="must be one of interactive, bulk") as caught:
        lane_of(Headers({"x-lane": asked}), FREE)
    assert caught.value.param == "x-lane"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["x-lane", "x-on-error", "x-metadata"])
async def test_unknown_choices_are_refused_before_anything_else(
    client: httpx2.AsyncClient, producer: StubProducer, name: str
) -> None:
    body = {"input": "a", "model": "gpt-9", "encoding_format": "bytes"}
    response = await client.post(URL, json=body, headers={name: "what"})
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", name)
    assert "'what'" in error["message"]
    assert producer.tokenised == []


async def test_the_lane_reaches_the_producer(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    for given, lane in ({}, Lane.INTERACTIVE), ({"x-lane": "bulk"}, Lane.BULK):
        response = await client.post(URL, json={"input": "a", "priority": 7}, headers=given)
        assert response.status_code == 200
        assert producer.runs[-1].options.lane is lane


def failing(producer: StubProducer) -> dict[int, InputFailure]:
    producer.failures = {1: InputFailure(Status.FAILED, "The model failed on this input.")}
    return producer.failures


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_with_partial_an_input_that_fails_leaves_the_others_their_vectors(
    client: httpx2.AsyncClient, producer: StubProducer, form: str
) -> None:
    failing(producer)
    body: dict[str, Any] = {"input": ["a b", "c", "d"], "encoding_format": form}
    whole = await client.post(URL, json=body)
    assert whole.status_code == 500

    with structlog.testing.capture_logs() as logs:
        response = await client.post(URL, json=body, headers={"x-on-error": "partial"})
    assert [(entry["status"], entry["failed_inputs"]) for entry in logs] == [(200, 1)]
    assert response.status_code == 200
    answer = response.json()
    assert [(item["index"], item["object"]) for item in answer["data"]] == [
        (0, "embedding"),
        (1, "error"),
        (2, "embedding"),
    ]
    assert answer["data"][1] == {
        "index": 1,
        "object": "error",
        "error": {
            "message": "The model failed on this input.",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        },
    }
    assert answer["usage"]["prompt_tokens"] == 4 + 3  # of those that have a vector


async def test_with_partial_an_input_that_is_refused_gets_the_error_of_a_whole_request(
    client: httpx2.AsyncClient,
) -> None:
    whole = (await client.post(URL, json={"input": [[3], [99]]})).json()["error"]
    answer = (await client.post(URL, json={"input": [[3], [99]]}, headers={"x-on-error": "partial"})).json()
    assert answer["data"][1]["error"] == whole
    assert "check_embedding_ctx_length=False" in whole["message"]


async def test_with_partial_all_may_fail(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.failures = {0: InputFailure(Status.FAILED, "no"), 1: InputFailure(Status.FAILED, "no")}
    response = await client.post(URL, json={"input": ["a", "b"]}, headers={"x-on-error": "partial"})
    assert response.status_code == 200
    assert [item["error"]["message"] for item in response.json()["data"]] == ["no", "no"]
    assert response.json()["usage"]["total_tokens"] == 0


async def test_with_partial_a_vector_that_is_none_fails_alone(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    def spoil(vectors: Any) -> Any:
        vectors[0, 0] = float("nan")
        return vectors

    producer.spoil = spoil
    response = await client.post(URL, json={"input": ["a b", "c"]}, headers={"x-on-error": "partial"})
    first, second = response.json()["data"]
    assert (first["object"], first["error"]["code"], second["object"]) == ("error", 500, "embedding")
    assert response.json()["usage"]["prompt_tokens"] == 3


async def test_to_fail_as_a_whole_may_be_said(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    failing(producer)
    response = await client.post(URL, json={"input": ["a", "b"]}, headers={"x-on-error": "fail"})
    assert response.status_code == 500


@pytest.mark.parametrize("form", ["bytes", "bytes_only"])
async def test_among_bytes_there_is_no_room_for_errors(
    client: httpx2.AsyncClient, producer: StubProducer, form: str
) -> None:
    body = {"input": ["a"], "encoding_format": form}
    error = (await client.post(URL, json=body, headers={"x-on-error": "partial"})).json()["error"]
    assert (error["code"], error["param"]) == (400, "x-on-error")
    assert f"encoding_format `{form}`" in error["message"]
    assert producer.tokenised == []


@pytest.mark.parametrize(
    ("inputs", "bad", "type_", "param"),
    [
        (["a", "a " * 20, "b"], 1, "BadRequestError", "input_tokens"),
        ([[3], [4], [99]], 2, "BadRequestError", "input"),
        ([[], [4], [5]], 0, "BadRequestError", "input"),
    ],
)
async def test_with_partial_what_is_refused_before_the_queue_fails_alone_too(
    client: httpx2.AsyncClient, producer: StubProducer, inputs: Any, bad: int, type_: str, param: str
) -> None:
    whole = (await client.post(URL, json={"input": inputs})).json()["error"]
    response = await client.post(URL, json={"input": inputs}, headers={"x-on-error": "partial"})
    assert response.status_code == 200
    items = response.json()["data"]
    assert [item["object"] for item in items] == ["error" if index == bad else "embedding" for index in range(3)]
    error = items[bad]["error"]
    assert (error["type"], error["param"], error["code"]) == (type_, param, 400)
    assert whole["message"].startswith(error["message"])


@pytest.mark.parametrize("body", [{"input": "a", "dimensions": 3}, {"input": []}, {"input": "a", "model": "other"}])
async def test_partial_does_not_mend_the_request_itself(client: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post(URL, json=body, headers={"x-on-error": "partial"})
    assert response.status_code in (400, 404)
