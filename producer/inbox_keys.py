"""What senders to an inbox and its receivers agree on; other languages find it in `docs/wire-format.md`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from embedstream.shared.errors import InvalidInput, MalformedMessage
from embedstream.shared.keys import Keys
from embedstream.shared.results import MAX_PART_BYTES

MAX_NOTE_BYTES = 64 * 1024
"""What the receiver is told of one job, at most 64 inputs, beside their vectors."""
_ABOUT_BYTES = 96 * 1024
"""Of a part: room for what is not vectors, when every row has failed for a reason of its own."""

RowId = str | int


def check_name(name: str) -> str:
    """The name of an inbox, when it is one.

    Raises:
        InvalidInput: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise InvalidInput(
            f"The name of an inbox is 1 to 100 letters, digits, dots, hyphens and underscores, not {name[:120]!r}.",
            param="to",
        )
    return name


def inbox_keys(keys: Keys, name: str) -> list[str]:
    """The stream and the hash of an inbox."""
    return [keys.inbox(name), keys.inbox_notes(name)]


def field_of(request_id: bytes, job: int) -> bytes:
    """The field of the hash that tells of a job."""
    return b"%s:%d" % (request_id.hex().encode(), job)


def most_rows(row_bytes: int) -> int:
    """Inputs of one job, such that its whole answer fits one part: then one receiver has it in one piece."""
    return max(1, (MAX_PART_BYTES - _ABOUT_BYTES) // row_bytes)


def note(tag: str, ids: Sequence[RowId] | None) -> bytes:
    """What the receiver is told of a job.

    Raises:
        InvalidInput: there is no room for it, or it is no text or number.
    """
    try:
        told = orjson.dumps({"tag": tag} if ids is None else {"tag": tag, "ids": list(ids)})
    except TypeError as error:
        raise InvalidInput(
            f"The tag is a text, and ids are texts or integers of at most 64 bits: {error}.", param="ids"
        ) from None
    if len(told) > MAX_NOTE_BYTES:
        raise InvalidInput(
            f"The tag and the ids of {0 if ids is None else len(ids)} inputs have {len(told)} bytes; at most "
            f"{MAX_NOTE_BYTES} travel with as many.",
            param="ids",
        )
    return told


def read_note(told: bytes) -> tuple[str, tuple[RowId, ...] | None]:
    """Tag and ids from what a field of the hash holds.

    Raises:
        MalformedMessage: it is something else.
    """
    try:
        said: dict[str, Any] = orjson.loads(told.partition(b" ")[2])
        ids = said.get("ids")
        return str(said.get("tag", "")), None if ids is None else tuple(ids)
    except (ValueError, TypeError, AttributeError) as error:
        raise MalformedMessage(f"what is told of a job is damaged: {error!r}") from error
