from __future__ import annotations

import httpx2
import pytest
from starlette.datastructures import Headers
from tests.api.conftest import StubProducer

from embedstream.api.deadline import timeout_s
from embedstream.shared.errors import InvalidInput


@pytest.mark.parametrize(
    ("own", "openai", "expected"),
    [
        (None, None, 60.0),
        ("1500", None, 1.5),
        (" 1500 ", None, 1.5),
        ("90000", None, 60.0),
        (None, "2.5", 2.5),
        (None, "600", 60.0),
        ("3000", "2", 2.0),
        ("1000", "2", 1.0),
        (None, "None", 60.0),
        (None, "", 60.0),
        (None, "nan", 60.0),
        (None, "inf", 60.0),
        (None, "-1", 60.0),
        (None, "0", 60.0),
    ],
)
def test_the_nearest_deadline_counts(own: str | None, openai: str | None, expected: float) -> None:
    given = {"x-request-timeout-ms": own, "x-stainless-read-timeout": openai}
    headers = Headers({name: value for name, value in given.items() if value is not None})
    assert timeout_s(headers, 60.0) == expected


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "soon", "1e3", "²", "9" * 5000])
def test_a_deadline_of_ours_is_a_whole_number(value: str) -> None:
    with pytest.raises(InvalidInput, match="whole number of milliseconds") as caught:
        timeout_s(Headers(raw=[(b"x-request-timeout-ms", value.encode("latin-1"))]), 60.0)
    assert caught.value.param == "x-request-timeout-ms"
    assert len(str(caught.value)) < 300


async def test_it_reaches_the_producer(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    await client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-timeout-ms": "2500"})
    assert producer.runs[0].options.timeout_s == 2.5
    response = await client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-timeout-ms": "soon"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-ms")
    assert len(producer.runs) == 1
