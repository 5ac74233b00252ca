from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import structlog
from starlette.applications import Starlette
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.shared.settings import Settings

URL = "/v1/embeddings"
Connect = Callable[[Starlette], httpx2.AsyncClient]


@pytest.mark.parametrize("given", ["mine", "a-b_c.d:e/f=+@", "x" * 128])
async def test_a_sane_request_id_is_echoed(client: httpx2.AsyncClient, given: str) -> None:
    for path in ("/livez", "/nowhere", URL):
        assert (await client.get(path, headers={"x-request-id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "ü", "tab\tbed"])
async def test_any_other_request_id_is_replaced(client: httpx2.AsyncClient, given: str | None) -> None:
    headers = {} if given is None else {b"x-request-id": given.encode()}
    ids = [(await client.get("/livez", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert all(len(made) == 16 and int(made, 16) >= 0 for made in ids)


async def test_one_line_for_each_request(client: httpx2.AsyncClient) -> None:
    with structlog.testing.capture_logs() as logs:
        response = await client.post(
            f"{URL}?token=hush", json={"input": ["confidential", "a"]}, headers={"authorization": "Bearer hush"}
        )
    (line,) = logs
    assert line.pop("duration_ms") >= 0
    assert line == {
        "event": "http.request",
        "log_level": "info",
        "method": "POST",
        "path": URL,
        "status": 200,
        "bytes": len(response.content),
        "inputs": 2,
        "tokens": 6,
        "form": "float",
        "lane": "interactive",
    }


async def test_neither_texts_nor_keys_are_logged(producer: StubProducer, connect_to: Connect) -> None:
    async with connect_to(create_app(Settings(api_key=("right-key",)), producer)) as client:
        with structlog.testing.capture_logs() as logs:
            for key in ("right-key", "wrong-key"):
                for body in ({"input": "confidential"}, {"input": "a", "encoding_format": "confidential"}):
                    await client.post(URL, json=body, headers={"authorization": f"Bearer {key}"})
    assert len(logs) == 4
    assert not any(word in str(logs) for word in ("confidential", "right-key", "wrong-key"))


async def test_probes_are_logged_at_debug_even_when_they_fail(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    with structlog.testing.capture_logs() as logs:
        await client.get("/health")
        producer.fleet.reason = "No consumer of `tiny` is alive."
        await client.get("/health")
        await client.get("/nowhere")
    assert [entry["log_level"] for entry in logs] == ["debug", "debug", "info"]


async def test_the_request_id_is_bound_to_every_line(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    seen: list[dict[str, Any]] = []

    def spoil(vectors: Any) -> Any:
        seen.append(structlog.contextvars.get_contextvars())
        return vectors

    producer.spoil = spoil
    await client.post(URL, json={"input": "a"}, headers={"x-request-id": "mine"})
    assert seen[0]["request_id"] == "mine"
