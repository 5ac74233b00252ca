"""What one HTTP request carries through the middleware: its id, and what the access log shall say of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

_KEY = "embedstream.context"


@dataclass(slots=True)
class Context:
    """State of one request.

    Args:
        request_id: of the header `X-Request-Id`, or made here.
        notes: fields for the line in the access log; never texts or keys.
    """

    request_id: str
    notes: dict[str, str | int] = field(default_factory=dict)

    def note(self, **fields: str | int) -> None:
        """Add fields to the request's line in the access log."""
        self.notes |= fields


def attach(scope: Scope, context: Context) -> None:
    """Put the context where the rest of the application finds it."""
    scope[_KEY] = context


def context_of(scope: Scope) -> Context:
    """The context of the request."""
    context: Context = scope[_KEY]
    return context
