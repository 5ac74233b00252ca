"""Cases as data: a request, what must come back, and the rules of docs/contract.md that this holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .client import Api, Reply

Check = Callable[[Reply, Api], object]
EMBEDDINGS = "/v1/embeddings"
TYPES = {
    400: ("BadRequestError", "Bad Request"),
    401: ("AuthenticationError",),
    403: ("PermissionDeniedError",),
    404: ("NotFoundError",),
    405: ("MethodNotAllowedError",),
    413: ("PayloadTooLargeError",),
    415: ("UnsupportedMediaTypeError",),
    429: ("RateLimitError",),
    500: ("InternalServerError",),
    501: ("NotImplementedError",),
    503: ("ServiceUnavailableError",),
    504: ("TimeoutError",),
}
_PRIVATE = re.compile(r"Traceback|\.py\b|site-packages|-key\b|redis\.sock|File \"")
"""Our own paths, code and keys."""
_PASSING = (408, 429, 503, 504)
"""Statuses that another try may not meet again."""


def each(*values: Any) -> tuple[Any, ...]:
    """Values of any kind, for cases that are alike."""
    return values


class Anything:
    """Stands for a `param` that a case has no word for."""


ANY = Anything()


@dataclass(frozen=True)
class Case:
    """One request and its answer.

    Args:
        rows: ids of the rules, separated by spaces.
        name: what it shows.
        body: bytes, or a value to be sent as JSON; None for none.
        method, path, headers: of the request.
        server: kind of server, see `servers.KINDS`.
        raw: send no content type by itself.
        status: of the answer.
        type, param: of an error's body; param ANY for whatever it is.
        message: what the error's message must match.
        answers: headers that must match; None for those that must be absent.
        check: looks at the rest.
    """

    rows: str
    name: str
    body: Any = None
    method: str = "POST"
    path: str = EMBEDDINGS
    headers: Mapping[str, str] = field(default_factory=dict)
    server: str = "tiny"
    raw: bool = False
    status: int = 200
    type: str | None = None
    param: str | Anything | None = ANY
    message: str = ""
    answers: Mapping[str, str | None] = field(default_factory=dict)
    check: Check | None = None

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.rows.replace(' ', '+')}-{re.sub(r'[^A-Za-z0-9]+', '-', self.name)[:60]}"

    def run(self, api: Api) -> Reply:
        """Ask, and compare the answer with what it must be."""
        reply = api.ask(self.method, self.path, self.body, self.headers, raw=self.raw)
        assert reply.status == self.status, (reply.status, reply.body[:600])
        assert re.fullmatch(r"[\x21-\x7e]{1,128}", reply.headers["x-request-id"])
        if self.status >= 400:
            self._check_error(reply)
        for name, pattern in self.answers.items():
            value = reply.headers.get(name)
            matched = value is None if pattern is None else value is not None and re.fullmatch(pattern, value)
            assert matched, (name, value)
        if self.check is not None:
            self.check(reply, api)
        return reply

    def _check_error(self, reply: Reply) -> None:
        assert reply.headers["content-type"] == "application/json"
        error = reply.error
        assert set(reply.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        assert error["type"] == self.type if self.type else error["type"] in TYPES.get(self.status, (error["type"],)), (
            error
        )
        if not isinstance(self.param, Anything):
            assert error["param"] == self.param, error
        assert re.search(self.message, error["message"]), error["message"]
        assert not _PRIVATE.search(error["message"]), error["message"]
        assert reply.headers.get("x-should-retry") == (None if self.status in _PASSING else "false")
        if self.status in (429, 503):
            assert 1 <= int(reply.headers["retry-after"]) <= 120


def ok(rows: str, name: str, body: Any, check: Check | None = None, **more: Any) -> Case:
    """A request that is answered."""
    return Case(rows, name, body, check=check, **more)


def bad(rows: str, name: str, body: Any, message: str = "", param: Any = ANY, **more: Any) -> Case:
    """A request that is understood and refused."""
    return Case(rows, name, body, **{"status": 400, "type": "BadRequestError", **more}, message=message, param=param)


def misfit(rows: str, name: str, body: Any, param: Any = ANY, message: str = "", **more: Any) -> Case:
    """A request that does not fit the schema."""
    return Case(rows, name, body, **{"status": 400, "type": "Bad Request", **more}, message=message, param=param)


def covers(*rows: str) -> Callable[[Any], Any]:
    """Says which rules a test function holds."""

    def mark(function: Any) -> Any:
        function.contract_rows = rows
        return function

    return mark
