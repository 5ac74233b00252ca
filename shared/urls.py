"""URLs as they may be shown."""

from __future__ import annotations

import re

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
"""How URLs of Redis begin."""


def without_password(url: str) -> str:
    """The URL with `***` for its password, in the user part or in the query."""
    # Up to the last `@`: a password may hold any sign, and hiding too much does no harm.
    hidden = re.sub(r"(?<=://)([^/@:]*):.*@", r"\1:***@", url, count=1)
    return re.sub(r"([?&]password=)[^&#]*", r"\1***", hidden)


def without_secrets(text: str) -> str:
    """A text whose URLs are shown without what may let somebody in: user and password, and the query of signed ones."""
    hidden = re.sub(r"(?<=://)[^\s/'\"]*@", "***@", text)
    return re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1***", hidden)
