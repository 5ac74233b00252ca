from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import structlog
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send
from tests.api.conftest import StubProducer

from embedstream.api.context import Context, attach
from embedstream.api.errors import (
    TABLE,
    ErrorBodies,
    HeadTooLarge,
    HttpError,
    MalformedRequest,
    RateLimited,
    RequestTooSlow,
    SchemaError,
    UnsupportedMediaTypeError,
    error_response,
    is_news,
    row_of,
)
from embedstream.shared import errors
from embedstream.shared.errors import EmbedstreamError, InvalidInput, JobFailed, ModelNotFound, Overloaded, Unavailable

URL = "/v1/embeddings"


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize(
    "kind", [*subclasses(EmbedstreamError), *subclasses(HttpError)], ids=lambda kind: kind.__name__
)
def test_every_error_has_a_row(kind: type[Exception]) -> None:
    assert kind in TABLE


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (errors.InvalidInput("x"), 400, "BadRequestError", "false"),
        (errors.InputTooLong("x"), 400, "BadRequestError", "false"),
        (SchemaError("x"), 400, "Bad Request", "false"),
        (errors.ModelNotFound("x"), 404, "NotFoundError", "false"),
        (errors.StaleCard("x"), 409, "ConflictError", "false"),
        (errors.Overloaded("x", retry_after_s=1), 429, "RateLimitError", None),
        (MalformedRequest("x"), 400, "BadRequestError", "false"),
        (RequestTooSlow("x"), 408, "RequestTimeoutError", None),
        (HeadTooLarge("x"), 431, "RequestHeaderFieldsTooLargeError", "false"),
        (UnsupportedMediaTypeError("x"), 415, "UnsupportedMediaTypeError", "false"),
        (RateLimited("x", retry_after_s=1), 429, "RateLimitError", None),
        (errors.JobFailed("x"), 500, "InternalServerError", "false"),
        (errors.MalformedJob("x"), 500, "InternalServerError", None),
        (errors.MalformedResult("x"), 500, "InternalServerError", None),
        (errors.ModelLoadError("x"), 500, "InternalServerError", None),
        (errors.Misconfigured("x"), 500, "InternalServerError", None),
        (errors.ServerNotFound("x"), 500, "InternalServerError", None),
        (errors.NotServed("x"), 501, "NotImplementedError", "false"),
        (errors.Unavailable("x"), 503, "ServiceUnavailableError", None),
        (errors.UnfitServer("x"), 503, "ServiceUnavailableError", None),
        (errors.ResultTimeout("x"), 504, "TimeoutError", None),
        (ZeroDivisionError("x"), 500, "InternalServerError", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_how_an_error_is_answered(
    client: httpx2.AsyncClient, producer: StubProducer, error: Exception, status: int, kind: str, retry: str | None
) -> None:
    producer.error = error
    response = await client.post(URL, json={"input": [3]})
    assert response.status_code == status
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["type"], body["code"]) == (kind, status)
    assert response.headers.get("x-should-retry") == retry
    assert ("retry-after" in response.headers) == (status in {429, 503})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("kind", [Overloaded, RateLimited, Unavailable])
@pytest.mark.parametrize(("seconds", "told"), [(0.0, "1"), (0.2, "1"), (2.1, "3"), (120.0, "120"), (9000.0, "120")])
def test_retry_after_is_whole_seconds_up_to_120(
    kind: type[Overloaded | RateLimited | Unavailable], seconds: float, told: str
) -> None:
    assert error_response(kind("x", retry_after_s=seconds), "id").headers["retry-after"] == told


def test_the_param_of_an_error_is_told() -> None:
    assert b'"param":"dimensions"' in error_response(InvalidInput("x", param="dimensions"), "id").body


def test_a_model_that_is_not_found_is_named_with_those_there_are() -> None:
    assert b"Served here: `a`, `b`." in error_response(ModelNotFound("x", known=("a", "b")), "id").body
    assert b'"The model `x` does not exist."' in error_response(ModelNotFound("x"), "id").body


def test_the_nearest_base_stands_in() -> None:
    class Special(JobFailed):
        pass

    try:
        assert row_of(Special("x")) is TABLE[JobFailed]
    finally:
        del Special  # so that the walk over the subclasses does not meet it


@pytest.mark.parametrize("error", [ValueError("the secret path /etc/shadow"), errors.MalformedResult("at 0x7f")])
async def test_internals_go_to_the_log_and_not_to_the_client(
    client: httpx2.AsyncClient, producer: StubProducer, error: Exception
) -> None:
    producer.error = error
    with structlog.testing.capture_logs() as logs:
        response = await client.post(URL, json={"input": "a"}, headers={"x-request-id": "mine"})
    assert str(error) not in response.text
    assert "mine" in response.json()["error"]["message"]
    (line,) = [entry for entry in logs if entry["event"] == "request.failed"]
    assert (line["log_level"], line["error"], line["exc_info"]) == ("error", type(error).__name__, True)


async def test_expected_errors_leave_no_traceback(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.error = JobFailed("given up")
    with structlog.testing.capture_logs() as logs:
        await client.post(URL, json={"input": "a"})
    assert [entry["event"] for entry in logs] == ["http.request"]
    assert logs[0]["error"] == "JobFailed"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        *(("/nowhere", ""), ("/", ""), ("/v1", ""), ("/score", ""), ("/v1/embeddings/x", ""), ("/" + "x" * 10_000, "")),
        *(
            (path, "/v1/embeddings")
            for path in ("/embeddings", "/v1/embeddings/", "/v1/v1/embeddings", "/v1/embedding")
        ),
        *(("/V1/models", "/v1/models"), ("/v1/pooling", "/pooling"), ("/healthz", "/health"), ("/doc/", "/docs")),
    ],
)
async def test_unknown_paths(client: httpx2.AsyncClient, path: str, meant: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    there = f": `{meant}` may be meant" if meant else ""
    assert response.json()["error"] == {
        "message": f"Not Found. There is no such path here{there}. GET /docs shows those there are.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }


async def test_wrong_methods(client: httpx2.AsyncClient) -> None:
    response = await client.get(URL)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["type"] == "MethodNotAllowedError"
    assert (await client.post("/v1/models")).headers["allow"] in {"GET, HEAD", "HEAD, GET"}


def scope_of(path: str = "/") -> dict[str, Any]:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "headers": []}
    attach(scope, Context("id"))
    return scope


async def test_a_response_that_has_begun_is_broken_off() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise JobFailed("late")

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(JobFailed):
        await ErrorBodies(app)(scope_of(), receive, send)
    assert [message["type"] for message in sent] == ["http.response.start"]


@pytest.mark.parametrize(
    ("error", "news"),
    [(JobFailed("x"), False), (SchemaError("x"), False), (errors.MalformedResult("x"), True), (KeyError("x"), True)],
)
def test_the_servers_log_does_not_repeat_ours(error: Exception, *, news: bool) -> None:
    record = logging.makeLogRecord({"msg": "Exception in ASGI application", "exc_info": (type(error), error, None)})
    assert is_news(record) is news


def test_what_else_the_server_logs_is_news() -> None:
    assert is_news(logging.makeLogRecord({"msg": "Invalid HTTP request received."}))


async def test_a_client_that_leaves_while_it_sends_is_no_failure(app: Starlette) -> None:
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": b'{"in', "more_body": True}, {"type": "http.disconnect"}]
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    with structlog.testing.capture_logs() as logs:
        await app(scope_of(URL) | {"method": "POST"}, receive, send)
    assert [message.get("status") for message in sent] == [499, None]  # for logs and metrics: nobody gets it
    assert [(entry["event"], entry["error"], entry["status"]) for entry in logs] == [
        ("http.request", "ClientDisconnect", 499)
    ]
