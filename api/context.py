"""What one HTTP request carries through the middleware: its id, and what the access log shall say of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

from embedstream.shared.lanes import Lane

_KEY = "embedstream.context"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key a request has.

    Args:
        name: of the key, for logs and metrics; no secret.
        lane: the lane the key is bound to, or None for any.
        tokens_per_s: what its quota grows by; None for no quota.
        burst_tokens: what its quota holds at most.
    """

    name: str
    lane: Lane | None = None
    tokens_per_s: float | None = None
    burst_tokens: float = 0.0


@dataclass(slots=True)
class Context:
    """State of one request.

    Args:
        request_id: of the header `X-Request-Id`, or made here.
        notes: fields for the line in the access log; never texts or keys.
        caller: whose key it has; None where no keys are set, and on open paths.
        headers: of the answer, whatever it will be.
        charged_tokens: what the request costs its caller.
        taken_tokens: how many of them were taken from a quota, as far as Redis has told.
        cut_status: of an answer that had begun when it was given up: what its status would have been; 0 for none.
    """

    request_id: str
    notes: dict[str, str | int] = field(default_factory=dict)
    caller: Caller | None = None
    headers: dict[str, str] = field(default_factory=dict)
    charged_tokens: int = 0
    taken_tokens: int = 0
    cut_status: int = 0

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
