"""Middleware around every endpoint, in plain ASGI: the request id, and the access log."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream.shared import metrics
from embedstream.shared.logs import get_logger

from .context import Context, attach, context_of
from .keys import METRICS_PATH, OPEN_PATHS

_QUIET_PATHS = OPEN_PATHS | {METRICS_PATH}

_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")  # visible ASCII: safe in a header, in JSON and in a log line
_LOGGED_PATH_CHARS = 200

log = get_logger()


class RequestId:
    """Gives each request an id: the client's `X-Request-Id` when it is sane, else 16 hex digits.

    It stands in the response's `X-Request-Id`, in the body's `id` and in every log line, and in nothing that must be
    unique: clients use theirs again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Attach the context, and answer with its id and the headers it has then."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else os.urandom(8).hex()
        context = Context(request_id)
        attach(scope, context)

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = {"x-request-id": request_id} | context.headers
                encoded = ((name.encode(), value.encode()) for name, value in added.items())
                message["headers"] = [*message.get("headers", ()), *encoded]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self.app(scope, receive, add_headers)


class AccessLog:
    """One line for each request: method, path without its query, status, size, time, and what endpoints noted.

    It counts them too, by the route's template and not by the path: those who try paths must not make new metrics.

    Args:
        app: what answers.
        routes: of the application.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self.app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the line once the response is sent, or was given up."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, sent, start = 0, 0, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            context = context_of(scope)
            if status and context.cut_status not in (0, status):  # it had begun well
                status = context.cut_status
                context.note(cut="yes")
            # A probe that finds no consumer yet is no news: whoever waits for the model asks twice a second.
            write = log.debug if scope["path"] in _QUIET_PATHS else log.warning if status >= 500 else log.info
            elapsed_s = time.perf_counter() - start
            template = self._template_of(scope["path"])
            metrics.HTTP_REQUESTS.labels(template, status).inc()
            metrics.HTTP_SECONDS.labels(template).observe(elapsed_s)
            write(
                "http.request",
                method=scope["method"],
                path=scope["path"][:_LOGGED_PATH_CHARS],
                status=status,  # 0: no answer was sent
                bytes=sent,
                duration_ms=round(elapsed_s * 1000, 1),
                **context.notes,
            )

    def _template_of(self, path: str) -> str:
        """The route a path belongs to, also when the request was refused before it was routed."""
        return next((route.path_format for route in self._routes if route.path_regex.match(path)), "other")
