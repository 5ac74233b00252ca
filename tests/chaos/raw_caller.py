"""A caller that follows docs/wire-format.md and nothing more: no producer library, no second sending."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from embedstream.shared import results
from embedstream.shared.jobs import Job
from embedstream.shared.keys import FIELD_BODY, FIELD_HEADER, FIELD_PARTS, FIELD_REPLY
from embedstream.shared.lanes import Lane

from . import toy
from .deployment import KEYS, Deployment
from .requests import Asked

_STREAM = KEYS.reply("raw")
_TTL_MS = 120_000


async def send(here: Deployment, many: Sequence[Asked]) -> dict[bytes, Asked]:
    """Put jobs on the interactive lane; returns them by request id."""
    await here.call("XADD", _STREAM, "*", FIELD_PARTS, b"")
    fingerprint = toy.card().fingerprint
    sent = {}
    for asked in many:
        lengths = np.array([len(row) for row in asked.inputs], np.uint32)
        ids = np.concatenate([np.array(row, np.uint16) for row in asked.inputs])
        job = Job(os.urandom(16), 0, 1, 0, _TTL_MS, lengths, ids=ids, fingerprint=fingerprint)
        header, body = job.encode()
        fields = (FIELD_HEADER, header, FIELD_BODY, body, FIELD_REPLY, _STREAM)
        await here.call("XADD", KEYS.lane(Lane.INTERACTIVE), "*", *fields)
        sent[job.request_id] = asked
    return sent


async def answered(here: Deployment, sent: dict[bytes, Asked]) -> set[bytes]:
    """Ids of the requests that have their vectors, exact ones.

    Raises:
        AssertionError: vectors are wrong.
    """
    ids = set()
    for _, fields in await here.call("XRANGE", _STREAM, "-", "+"):
        for framed in results.unframe(fields[FIELD_PARTS]):
            part = results.decode(framed)
            assert np.array_equal(part.vectors, toy.expected(sent[part.request_id].inputs)), part.request_id.hex()
            ids.add(part.request_id)
    return ids
