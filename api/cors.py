"""Browsers: which pages may call the API, and which headers of its answers they may read."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from embedstream.shared.errors import InvalidInput

from .errors import error_response

EXPOSED_HEADERS = (
    "allow",
    "metadata",
    "retry-after",
    "x-compute-tokens",
    "x-inference-time-ms",
    "x-queue-time-ms",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "x-request-id",
    "x-should-retry",
    "x-total-time-ms",
    "x-truncated-inputs",
)
"""What a page may read beside the body; browsers hide all else."""

METHODS = ("GET", "POST")
_PREFLIGHT_S = 600  # a browser asks again after this time; Chromium keeps an answer for two hours at most


class Cors(CORSMiddleware):
    """Starlette's, for bearer keys, with refusals in our error form.

    It stands outside of what answers errors and asks for keys: pages can read a 401 and its message, and a preflight,
    with which browsers send no key, needs none. Cookies are not allowed: no answer depends on them.

    Args:
        app: what answers all but preflights.
        origins: such as `https://app.example`; `*` for any.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # clients send many of their own, the openai package a dozen
            expose_headers=EXPOSED_HEADERS,
            max_age=_PREFLIGHT_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Whether a page may do what it is about to."""
        allowed = super().preflight_response(request_headers)
        if allowed.status_code == 200:
            return allowed
        what = bytes(allowed.body).decode().removeprefix("Disallowed CORS ")
        refused = error_response(InvalidInput(f"Not allowed from a page of another site: its {what}."), "")
        refused.headers.update({name: value for name, value in allowed.headers.items() if "content" not in name})
        return refused
