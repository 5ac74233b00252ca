"""What a running backfill process says of itself every few seconds: in the state folder, and in Redis.

In the folder it is found by whoever looks at it, without any server; in Redis by other machines of the fleet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from embedstream.shared.keys import backfills
from embedstream.shared.processes import Identity

from .drafts import host_name

EVERY_S = 5.0
LASTS_S = 15.0
"""A process that has said nothing for so long is taken for dead, where its pid cannot be looked at."""
_FIELDS = ("id", "out", "host", "pid", "started", "taken", "total", "bad_rows", "rows_per_s", "doing")


@dataclass(frozen=True, slots=True)
class Beat:
    """One process, and the backfill that it works on.

    Args:
        id: of the backfill.
        out: where it writes, without a password.
        host: its machine.
        pid: of the process.
        started: when, with the pid telling it from later processes.
        taken: rows of the input in committed parts, by all processes.
        total: rows of the input, where that is known.
        bad_rows: left out so far, by all processes.
        rows_per_s: of this process.
        doing: what it waits for, in words; "" while it works.
    """

    id: str
    out: str
    host: str
    pid: int
    started: int
    taken: int
    total: int | None
    bad_rows: int
    rows_per_s: float
    doing: str

    @property
    def mark(self) -> str:
        """Tells the process from all others."""
        return f"{self.host}-{self.pid}-{self.started}"

    def encode(self, until_ms: int = 0) -> bytes:
        """Its JSON.

        Args:
            until_ms: when it is out of date, on Redis's clock.
        """
        return json.dumps(asdict(self) | {"until_ms": until_ms}).encode()


def beats_in(folder: Path) -> dict[str, Beat]:
    """The live processes that leave their beats in a folder; those of dead ones on this machine are removed."""
    found = {}
    for path in folder.glob("*.json"):
        try:
            beat, _ = _decoded(path.read_bytes())
            age_s = time.time() - path.stat().st_mtime
        except (OSError, ValueError):  # it ended just now, or is no beat
            continue
        here = beat.host == host_name()
        if Identity(beat.pid, beat.started).is_alive if here else age_s < LASTS_S:
            found[beat.mark] = beat
        elif here:
            with suppress(OSError):  # the folder may be for reading only
                path.unlink(missing_ok=True)
    return found


def beats_at(redis: Redis, prefix: str) -> dict[str, Beat]:
    """The live processes that a Redis has heard of.

    Args:
        redis: a client.
        prefix: beginning of all keys.

    Raises:
        RedisError: Redis is not to be had.
    """
    table: Any = redis.hgetall(backfills(prefix))
    seconds, micros = redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    found, gone = {}, []
    for mark, value in table.items():
        try:
            beat, until_ms = _decoded(value)
        except ValueError:
            continue  # of another version
        if until_ms > now_ms:
            found[beat.mark] = beat
        else:
            gone.append(mark)
    if gone:
        redis.hdel(backfills(prefix), *gone)
    return found


def _decoded(data: bytes) -> tuple[Beat, int]:
    try:
        fields: Mapping[str, Any] = json.loads(data)
        return Beat(**{name: fields[name] for name in _FIELDS}), int(fields["until_ms"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a beat: {error!r}") from error
