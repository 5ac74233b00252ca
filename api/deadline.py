"""How long a client waits: the nearest of what it says, what the openai package says for it, and the setting."""

from __future__ import annotations

import math

from starlette.datastructures import Headers

from embedstream.shared.errors import InvalidInput

OWN = "x-request-timeout-ms"
OF_OPENAI = "x-stainless-read-timeout"
_MOST_DIGITS = 18


def timeout_s(headers: Headers, limit_s: float) -> float:
    """Seconds until nobody waits for the answer any more.

    Args:
        headers: of the request.
        limit_s: the setting `request_timeout_s`.

    Raises:
        InvalidInput: the header made for it holds no whole number of milliseconds above 0.
    """
    return min(limit_s, _own_s(headers.get(OWN)), _of_openai_s(headers.get(OF_OPENAI)))


def _own_s(value: str | None) -> float:
    if value is None:
        return math.inf
    digits = value.strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > _MOST_DIGITS or int(digits) == 0:
        raise InvalidInput(
            f"The header {OWN} must be a whole number of milliseconds above 0 (got {value[:80]!r}).", param=OWN
        )
    return int(digits) / 1000


def _of_openai_s(value: str | None) -> float:
    """What the package sends by itself is taken where it makes sense; its user has never seen it."""
    try:
        seconds = float(value or "")
    except ValueError:
        return math.inf
    return seconds if seconds > 0 else math.inf  # not a number fails the comparison too
