"""What the headers of a request ask for beside its body."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request

from embedstream.shared.errors import InvalidInput
from embedstream.shared.lanes import Lane

from . import deadline
from .context import Caller, context_of
from .errors import LaneForbidden
from .schemas import EncodingFormat

LANE = "x-lane"
ON_ERROR = "x-on-error"
METADATA = "x-metadata"

_FAIL, _PARTIAL = "fail", "partial"
_SEND, _OMIT = "send", "omit"
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Choices:
    """What one request asks for.

    Args:
        lane: where its jobs go.
        partial: whether inputs that fail alone shall leave the others their vectors.
        with_metadata: whether the form `bytes` comes with its `metadata` header.
        timeout_s: seconds until nobody waits for the answer any more.
    """

    lane: Lane
    partial: bool
    with_metadata: bool
    timeout_s: float

    @classmethod
    def of(cls, request: Request, encoding: EncodingFormat, limit_s: float) -> Choices:
        """Read the headers.

        Args:
            request: what came.
            encoding: the form of the answer.
            limit_s: the setting `request_timeout_s`.

        Raises:
            InvalidInput: a header holds what it cannot, or asks for what the form has no room for.
            LaneForbidden: the lane is not for this key.
        """
        headers = request.headers
        partial, packed = is_partial(headers), encoding in ("bytes", "bytes_only")
        if partial and packed:
            raise InvalidInput(
                f"The header {ON_ERROR}: {_PARTIAL} does not go with encoding_format `{encoding}`, where there is no "
                "room for an error among the vectors. Use `float` or `base64`.",
                param=ON_ERROR,
            )
        return cls(
            lane_of(headers, context_of(request.scope).caller),
            partial,
            encoding == "bytes" and not omits_metadata(headers),
            deadline.timeout_s(headers, limit_s),
        )


def lane_of(headers: Headers, caller: Caller | None) -> Lane:
    """The lane a request goes on: what it asks for, else that of its key, else interactive.

    Args:
        headers: of the request.
        caller: whose key it has.

    Raises:
        InvalidInput: there is no such lane.
        LaneForbidden: its key is bound to bulk, and it asks for interactive.
    """
    bound = caller.lane if caller is not None else None
    asked = _choice(headers, LANE, Lane)
    if asked is None:
        return bound or Lane.INTERACTIVE
    if bound is Lane.BULK and asked != bound:
        raise LaneForbidden(
            f"This key is bound to the lane `{bound}`: send the header {LANE}: {bound}, or none at all."
        )
    return Lane(asked)


def is_partial(headers: Headers) -> bool:
    """Whether inputs that fail alone shall leave the others their vectors.

    Raises:
        InvalidInput: the header holds neither `fail` nor `partial`.
    """
    return _choice(headers, ON_ERROR, (_FAIL, _PARTIAL)) == _PARTIAL


def omits_metadata(headers: Headers) -> bool:
    """Whether the form `bytes` shall come without its `metadata` header.

    Raises:
        InvalidInput: the header holds neither `send` nor `omit`.
    """
    return _choice(headers, METADATA, (_SEND, _OMIT)) == _OMIT


def _choice(headers: Headers, name: str, choices: Iterable[str]) -> str | None:
    given = headers.get(name)
    if given is None:
        return None
    value = given.strip().lower()
    if value not in tuple(choices):
        raise InvalidInput(
            f"The header {name} must be one of {', '.join(choices)} (got {given[:_SHOWN_CHARS]!r}).", param=name
        )
    return value
