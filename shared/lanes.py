"""The lanes: one stream for each priority."""

from __future__ import annotations

from enum import StrEnum


class Lane(StrEnum):
    """A stream of one priority. Consumers read interactive first; bulk fills what is left."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


LANES: tuple[Lane, ...] = (Lane.INTERACTIVE, Lane.BULK)
"""In the order of priority; a lane's place here is its code on the wire."""
