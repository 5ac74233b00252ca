"""JSON that is too large to be made as a whole: it leaves slice by slice."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
from numpy.typing import NDArray
from starlette.applications import Starlette
from tests.api.conftest import DIM, RECIPE, StubProducer, served_model
from tests.api.test_streaming import FOUR, Exchange, Gate

from embedstream.api import answering
from embedstream.producer import InputFailure
from embedstream.shared.errors import ResultTimeout
from embedstream.shared.results import Status


@pytest.fixture
def large_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any JSON counts as too large to be made as a whole."""
    monkeypatch.setattr(answering, "_WHOLE_JSON_BYTES", 0)


@pytest.mark.usefixtures("large_json")
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_large_json_leaves_while_it_is_made(app: Starlette, producer: StubProducer, form: str) -> None:
    expected = (await Exchange({"input": FOUR, "encoding_format": "bytes_only"}).run(app)).content
    gate = Gate(producer)
    exchange = Exchange({"input": FOUR, "encoding_format": form})
    served = asyncio.create_task(exchange.run(app))
    gate.open(0)
    await exchange.until_bytes(150)
    assert exchange.status == 200
    assert "content-length" not in exchange.headers  # it comes in chunks: a cut is seen by the last one missing
    assert "x-queue-time-ms" not in exchange.headers
    assert (exchange.headers["content-type"], exchange.headers["x-truncated-inputs"]) == ("application/json", "0")
    assert exchange.content.startswith(b'{"id":"embd-')
    assert b'"index":2' not in exchange.content
    gate.open(2)
    await served
    assert exchange.complete
    answer = exchange.json
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    vectors = [item["embedding"] for item in answer["data"]]
    if form == "base64":
        assert b"".join(map(base64.b64decode, vectors)) == expected
    else:
        np.testing.assert_array_equal(np.array(vectors, "<f4").ravel(), np.frombuffer(expected, "<f4"))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 15


@pytest.mark.usefixtures("large_json")
async def test_inputs_that_fail_alone_in_large_json(app: Starlette, producer: StubProducer) -> None:
    producer.failures = {3: InputFailure(Status.FAILED, "no vector")}

    def spoil(vectors: NDArray[Any]) -> NDArray[Any]:
        vectors[2, 0] = np.nan
        return vectors

    producer.spoil = spoil
    with structlog.testing.capture_logs() as logs:
        exchange = await Exchange({"input": [*FOUR, ""], "add_special_tokens": False}, x_on_error="partial").run(app)
    kinds = ["embedding", "embedding", "error", "error", "error"]
    assert [(item["index"], item["object"]) for item in exchange.json["data"]] == list(enumerate(kinds))
    assert exchange.json["usage"]["prompt_tokens"] == 3
    assert [entry["failed_inputs"] for entry in logs if entry["event"] == "http.request"] == [3]


@pytest.mark.usefixtures("large_json")
@pytest.mark.parametrize(("place", "status"), [(0, 504), (2, 200)])
async def test_failures_of_large_json(app: Starlette, producer: StubProducer, place: int, status: int) -> None:
    gate = Gate(producer)
    gate.error[place] = ResultTimeout("No complete result within 1 s.")
    gate.open(0)
    gate.open(2)
    exchange = Exchange({"input": FOUR})
    if status == 200:
        with pytest.raises(ResultTimeout):
            await exchange.run(app)
    else:
        await exchange.run(app)
    assert exchange.status == status
    assert exchange.complete is (status != 200)


@pytest.mark.usefixtures("large_json")
async def test_large_json_of_a_model_replaced_before_its_first_vectors(app: Starlette, producer: StubProducer) -> None:
    producer.moved_to = served_model(replace(RECIPE, dimension=2 * DIM))
    exchange = await Exchange({"input": FOUR}).run(app)
    assert [len(item["embedding"]) for item in exchange.json["data"]] == [2 * DIM] * 4


@pytest.mark.usefixtures("large_json")
async def test_large_json_that_begins_with_no_vector(app: Starlette, producer: StubProducer) -> None:
    producer.spoil = lambda vectors: vectors * np.nan
    exchange = await Exchange({"input": FOUR}).run(app)
    assert (exchange.status, exchange.json["error"]["type"]) == (500, "InternalServerError")


@pytest.mark.usefixtures("large_json")
async def test_large_json_over_http_1_0_has_a_length(app: Starlette) -> None:
    exchange = await Exchange({"input": FOUR}, http_version="1.0").run(app)
    assert exchange.promised == len(exchange.content)
    assert len(exchange.json["data"]) == 4
