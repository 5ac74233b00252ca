"""The one table from exceptions to HTTP: status, type and headers; and the middleware that reads it.

Every error body has the shape `{"error": {"message", "type", "param", "code"}}`, whoever raised the exception: an
endpoint, the router, a middleware, or nobody on purpose. `x-should-retry: false` keeps the official clients from
sending again what cannot succeed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from http import HTTPStatus

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream.shared.errors import (
    EmbedstreamError,
    InputTooLong,
    InvalidInput,
    JobFailed,
    MalformedJob,
    MalformedMessage,
    MalformedResult,
    Misconfigured,
    ModelLoadError,
    ModelNotFound,
    NotServed,
    Overloaded,
    ResultNotFound,
    ResultTimeout,
    ServerNotFound,
    StaleCard,
    Unavailable,
    UnfitServer,
    UnknownTokenId,
)
from embedstream.shared.logs import get_logger

from .context import context_of

_CLIENT_CLOSED = 499
_LONGEST_WORD = 40
MAX_RETRY_AFTER_S = 120
"""The official openai client gives up at once when it is told to wait longer."""
CONTENT_CODINGS = ("gzip", "zstd", "deflate", "identity")
"""How bodies of requests may be compressed."""

log = get_logger()


class HttpError(Exception):
    """Base of the refusals that only HTTP knows."""


class SchemaError(HttpError):
    """The body is not the JSON the endpoint expects; `param` is the path to the first wrong place."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PathNotFound(HttpError):
    """Nothing is served under the path."""


class UnauthorizedError(HttpError):
    """The request has none of the keys."""


class LaneForbidden(HttpError):
    """The request asks for a better lane than its key may use."""


class UnsupportedMediaTypeError(HttpError):
    """The body is compressed in a way that is not understood."""


class RateLimited(HttpError):
    """The quota of the request's key is used up; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PayloadTooLargeError(HttpError):
    """The body is larger than the limit."""


class MalformedRequest(HttpError):
    """The bytes are no HTTP request, or one whose end cannot be told for certain."""


class RequestTooSlow(HttpError):
    """The client takes too long to send its request."""


class HeadTooLarge(HttpError):
    """Request line and headers are larger than the limit."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one class of exceptions is answered.

    Args:
        status: HTTP status; also the body's `code`.
        type: the body's `type`.
        permanent: whether sending the same request again is pointless.
        advice: a sentence added to the exception's message.
        headers: sent along.
        shown: whether the exception's message is for clients; if not, it goes to the log alone.
    """

    status: int
    type: str
    permanent: bool = True
    advice: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    shown: bool = True


_RETOKENISE = (
    "Tokenize the input again with the tokenizer of the model's present revision (GET /v1/models names it) "
    "and send the new token ids."
)

_SEND_TEXTS = (
    "Ids that the model does not have are most likely another tokenizer's: send texts instead (LangChain: "
    "check_embedding_ctx_length=False), or have the server read ids as cl100k_base (--token-ids cl100k)."
)

_DEADLINE = (
    "The deadline is the nearest of the request's headers x-request-timeout-ms and x-stainless-read-timeout and the "
    "server's --request-timeout-s."
)

TABLE: Mapping[type[Exception], Row] = {
    SchemaError: Row(400, "Bad Request"),
    InvalidInput: Row(400, "BadRequestError"),
    InputTooLong: Row(400, "BadRequestError"),
    UnknownTokenId: Row(400, "BadRequestError", advice=_SEND_TEXTS),
    MalformedRequest: Row(400, "BadRequestError"),
    UnauthorizedError: Row(401, "AuthenticationError", headers=(("WWW-Authenticate", "Bearer"),)),
    LaneForbidden: Row(403, "PermissionDeniedError"),
    ModelNotFound: Row(404, "NotFoundError"),
    ResultNotFound: Row(404, "NotFoundError"),
    PathNotFound: Row(404, "NotFoundError"),
    RequestTooSlow: Row(408, "RequestTimeoutError", permanent=False),
    StaleCard: Row(409, "ConflictError", advice=_RETOKENISE),
    PayloadTooLargeError: Row(413, "PayloadTooLargeError"),
    UnsupportedMediaTypeError: Row(
        415, "UnsupportedMediaTypeError", headers=(("Accept-Encoding", ", ".join(CONTENT_CODINGS)),)
    ),
    RateLimited: Row(429, "RateLimitError", permanent=False),
    Overloaded: Row(429, "RateLimitError", permanent=False),
    HeadTooLarge: Row(431, "RequestHeaderFieldsTooLargeError"),
    JobFailed: Row(500, "InternalServerError"),
    NotServed: Row(501, "NotImplementedError"),
    Unavailable: Row(503, "ServiceUnavailableError", permanent=False),
    UnfitServer: Row(503, "ServiceUnavailableError", permanent=False),
    ResultTimeout: Row(504, "TimeoutError", permanent=False, advice=_DEADLINE),
    # The operator's matter: told to the log, not to clients
    MalformedMessage: Row(500, "InternalServerError", permanent=False, shown=False),
    MalformedJob: Row(500, "InternalServerError", permanent=False, shown=False),
    MalformedResult: Row(500, "InternalServerError", permanent=False, shown=False),
    ModelLoadError: Row(500, "InternalServerError", permanent=False, shown=False),
    Misconfigured: Row(500, "InternalServerError", permanent=False, shown=False),
    ServerNotFound: Row(500, "InternalServerError", permanent=False, shown=False),
}

_OF_ROUTER: Mapping[int, Row] = {
    405: Row(405, "MethodNotAllowedError"),
}
"""What Starlette's router raises, all of one class."""

_UNEXPECTED = Row(500, "InternalServerError", permanent=False, shown=False)


def statuses() -> dict[int, list[str]]:
    """All statuses of errors, each with the types there are of it."""
    found: dict[int, set[str]] = {}
    for row in (*TABLE.values(), *_OF_ROUTER.values()):
        found.setdefault(row.status, set()).add(row.type)
    return {status: sorted(found[status]) for status in sorted(found)}


def row_of(error: Exception) -> Row:
    """The row of the exception's class, or of its nearest base that has one."""
    if isinstance(error, HTTPException):
        return _OF_ROUTER.get(error.status_code) or Row(error.status_code, "Bad Request")
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _UNEXPECTED)


def error_response(error: Exception, request_id: str) -> Response:
    """The answer that the table gives for an exception."""
    row = row_of(error)
    body = orjson.dumps({"error": error_fields(error, request_id)})
    return Response(body, row.status, _headers(error, row), "application/json")


def error_fields(error: Exception, request_id: str) -> dict[str, str | int | None]:
    """What an error body says of an exception, and an item of `data` of an input that failed alone."""
    row = row_of(error)
    message = _message(error, row) if row.shown else f"Internal error; the server's log has it under {request_id}."
    param = error.param if isinstance(error, InvalidInput | ModelNotFound | SchemaError) else None
    return {"message": message, "type": row.type, "param": param, "code": row.status}


def _message(error: Exception, row: Row) -> str:
    message = error.detail if isinstance(error, HTTPException) else str(error)
    if isinstance(error, ModelNotFound) and error.known:
        message += f" Served here: {', '.join(f'`{name}`' for name in error.known)}."
    if not row.advice:
        return message
    return f"{message}{'' if message.endswith('.') else '.'} {row.advice}"


def _headers(error: Exception, row: Row) -> dict[str, str]:
    headers = dict(row.headers)
    if row.permanent:
        headers["x-should-retry"] = "false"
    if isinstance(error, Overloaded | RateLimited | Unavailable):
        # Whole seconds, as the header is defined; never 0, which asks for an immediate second try.
        headers["Retry-After"] = str(min(MAX_RETRY_AFTER_S, max(1, math.ceil(error.retry_after_s))))
    if isinstance(error, HTTPException) and error.headers:  # Allow
        headers |= error.headers
    return headers


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the HTTP server's log tells what ours does not.

    It writes the whole traceback of every answer that is cut, and the access log has those that failed on purpose.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, EmbedstreamError | HttpError) and row_of(error).shown)


async def pass_on(request: Request, error: Exception) -> Response:
    """Let an exception of the router travel on to `ErrorBodies`, so that all are answered in one place."""
    if isinstance(error, HTTPException) and error.status_code == HTTPStatus.NOT_FOUND:
        meant = nearest(request.url.path, [route.path for route in request.app.routes])
        raise PathNotFound(f"Not Found. There is no such path here{meant}. GET /docs shows those there are.")
    raise error


def nearest(path: str, paths: Iterable[str]) -> str:
    """The path that is most likely meant by one that there is not, as a part of a sentence, or "".

    What differs is mostly `/v1`, left out or twice, or a slash at the end: the last words are compared.
    """
    there = {_last_word(each): each for each in paths if "{" not in each}
    found = get_close_matches(_last_word(path)[:_LONGEST_WORD], there, 1, 0.75)
    return f": `{there[found[0]]}` may be meant" if found else ""


def _last_word(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].lower()


class ErrorBodies:
    """Middleware that answers every exception from further in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what it raises becomes the response, unless one has begun."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        context = context_of(scope)
        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            context.note(error="ClientDisconnect")
            context.cut_status = _CLIENT_CLOSED
            if not started:  # nobody is left to answer; what logs and metrics see of it is nginx's status for this
                await Response(status_code=_CLIENT_CLOSED)(scope, receive, send)
        except Exception as error:  # whatever it is, the client gets our body and no internals
            if not row_of(error).shown:
                log.exception("request.failed", error=type(error).__name__)
            context.note(error=type(error).__name__)
            if started:
                context.cut_status = row_of(error).status
                raise  # too late for an answer: the server cuts the connection, so the client sees the failure
            await error_response(error, context.request_id)(scope, receive, send)
