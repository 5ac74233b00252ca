"""All Redis keys, in one place.

Every key of one model carries the hash tag `{model}`, so that each script and each MULTI stays in one slot of a
Redis Cluster. The tables of models, of failures and of backfills stand outside: they are written and read by single
commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from .lanes import Lane

GROUP = "g"
"""The one consumer group of each lane."""

FIELD_HEADER, FIELD_BODY, FIELD_REPLY = b"h", b"b", b"rt"
"""The fields of a job's stream entry, always these and in this order: Redis then stores their names once."""

FIELD_CANCELLED = b"c"
"""The field of a notice that names abandoned requests: their ids, 16 bytes each, one behind the other."""

FIELD_RELEASED = b"w"
"""The field of a notice that a consumer has given entries back: others look for them at once."""

FIELD_PARTS = b"p"
"""The field of a reply entry: result parts, each with its length before it."""

FIELD_JOBS = b"jobs"
"""The field of a kept result that tells how many jobs the request has; beside it the parts, as `<job>:<part>`."""

FIELD_ROWS = b"rows"
"""The field of a kept result that tells how its rows make up its inputs: JSON, or nothing where each is one."""

FIELD_WAS_CANCELLED = b"cancelled"
"""The field that is left of a kept result whose request was cancelled."""


def models(prefix: str) -> str:
    """Hash: served name -> JSON of `ModelEntry`."""
    return f"{prefix}:models"


def failures(prefix: str) -> str:
    """Hash: served name -> the status key that says why a consumer could not serve it; expires with the newest."""
    return f"{prefix}:failures"


def backfills(prefix: str) -> str:
    """Hash: process -> JSON of `Beat`, by the backfills that run now; expires when none does."""
    return f"{prefix}:backfills"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one model.

    Args:
        prefix: namespace of one embedstream deployment within a Redis database.
        model: the model's first served name; it becomes the hash tag.
    """

    prefix: str
    model: str

    @property
    def base(self) -> str:
        """The common beginning. Braces would end the hash tag early, so they are replaced."""
        return f"{self.prefix}:{{{self.model.replace('{', '(').replace('}', ')')}}}"

    def lane(self, lane: Lane) -> str:
        """Stream of jobs."""
        return f"{self.base}:q:{'i' if lane is Lane.INTERACTIVE else 'b'}"

    def reply(self, instance: str) -> str:
        """Stream of results for one producer process; expires unless its reader renews it."""
        return f"{self.base}:r:{instance}"

    def inbox(self, name: str) -> str:
        """Stream of results that a group of receivers shares; expires unless its senders or receivers renew it."""
        return f"{self.base}:r:to:{name}"

    def inbox_notes(self, name: str) -> str:
        """Hash `<request id>:<job>` -> what the receiver is told beside the result: see `producer/forward.lua`."""
        return f"{self.base}:to:{name}"

    def quota(self, name: str) -> str:
        """Hash: what is left of the quota of one of the API's keys; expires when it would be full."""
        return f"{self.base}:quota:{name}"

    def result(self, request_id: bytes) -> str:
        """Hash `<job>:<part>` -> result part, for callers that pick up later; expires."""
        return f"{self.base}:res:{request_id.hex()}"

    @property
    def totals(self) -> str:
        """Hash: all that was ever put on the lanes, for admission: see `producer/enqueue.lua`."""
        return f"{self.base}:sum"

    @property
    def notices(self) -> str:
        """Stream, capped: what callers and consumers tell all consumers; best effort, nothing depends on it."""
        return f"{self.base}:cx"

    @property
    def trials(self) -> str:
        """Hash: id of a suspected entry -> rows that ran when a consumer died with it alone; expires."""
        return f"{self.base}:trial"

    @property
    def dead_letters(self) -> str:
        """Stream of jobs given up, with their original fields and the reason."""
        return f"{self.base}:dlq"

    def heartbeat(self, consumer: str) -> str:
        """String: JSON of `Announcement`; expires when the consumer stops renewing it."""
        return f"{self.base}:hb:{consumer}"

    @property
    def live(self) -> str:
        """Sorted set: consumer -> expiry in milliseconds of Redis's clock."""
        return f"{self.base}:live"

    def card(self, fingerprint: bytes, piece: int) -> str:
        """String: one piece of a model card."""
        return f"{self.base}:card:{fingerprint.hex()}:{piece}"

    def status(self, consumer: str) -> str:
        """String: why a consumer could not serve its model; expires."""
        return f"{self.base}:status:{consumer}"
