from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
import structlog
from starlette.applications import Starlette
from starlette.types import Message
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.api.middleware import OPEN_PATHS, Keys
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


@pytest.fixture
async def guarded(producer: StubProducer, connect_to: Connect) -> AsyncIterator[httpx2.AsyncClient]:
    async with connect_to(create_app(Settings(api_key=("first", "second ü")), producer)) as client:
        yield client


@pytest.mark.parametrize("header", ["Bearer first", "bearer first", "BEARER  first ", "Bearer second ü"])
async def test_each_key_opens(guarded: httpx2.AsyncClient, header: str) -> None:
    assert (await guarded.get("/v1/models", headers={b"authorization": header.encode()})).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer firs", "Bearer firstt", "Basic first", "first", "Bearer first x"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/metrics", "/health/", "/v1/health", "//health"])
async def test_anything_else_is_401(guarded: httpx2.AsyncClient, header: str | None, path: str) -> None:
    response = await guarded.get(path, headers={} if header is None else {"authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, 401)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_open_paths_need_no_key(guarded: httpx2.AsyncClient, path: str) -> None:
    assert (await guarded.get(path)).status_code == 200


async def test_only_a_preflight_passes_without_a_key(guarded: httpx2.AsyncClient) -> None:
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    assert (await guarded.options(URL, headers=preflight)).status_code == 405
    assert (await guarded.options(URL)).status_code == 401
    assert (await guarded.get("/v1/models", headers=preflight)).status_code == 401


async def test_a_request_without_a_key_is_not_read(guarded: httpx2.AsyncClient, producer: StubProducer) -> None:
    assert (await guarded.post(URL, content=b"not even JSON")).status_code == 401
    assert producer.tokenised == []


def test_keys_are_kept_as_digests_only() -> None:
    async def app(*_: object) -> None: ...

    assert "hush-hush" not in repr(vars(Keys(app, ["hush-hush"])))


async def test_without_keys_all_is_open(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/models", headers={"authorization": "Bearer whatever"})).status_code == 200


async def test_a_body_that_announces_too_much_is_refused_unread(producer: StubProducer, connect_to: Connect) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    async with connect_to(create_app(Settings(payload_limit=1024), producer)) as client:
        response = await client.post(URL, content=body(), headers={"content-length": "1025"})
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("PayloadTooLargeError", 413)
    assert "1025 bytes; at most 1024 are allowed (--payload-limit)" in error["message"]


async def test_a_body_is_counted_as_it_comes(producer: StubProducer) -> None:
    app = create_app(Settings(payload_limit=1024), producer)
    reads = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    await app({"type": "http", "method": "POST", "path": URL, "headers": headers}, receive, send)
    assert sent[0]["status"] == 413
    assert reads == 11


async def test_a_body_of_exactly_the_limit_is_taken(producer: StubProducer, connect_to: Connect) -> None:
    content = b'{"input": "a"}'.ljust(1024)
    headers = {"content-type": "application/json"}
    async with connect_to(create_app(Settings(payload_limit=1024), producer)) as client:
        assert (await client.post(URL, content=content, headers=headers)).status_code == 200
        assert (await client.post(URL, content=content + b" ", headers=headers)).status_code == 413
