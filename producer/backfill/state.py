"""What a backfill remembers: its manifest, which parts are committed, and who works on which.

All of it lies in a folder beside the output, `OUT.backfill`. A record is written under a temporary name, made durable
and renamed, after the part itself: a part without a record is simply made again, under the same name.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .blocks import BadRow
from .plan import PartId


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What is known of a committed part.

    Args:
        part: which one.
        taken: rows of the input it stands for.
        rows: rows in the output.
        texts: unique texts that were computed for it.
        tokens: of those.
        bad: rows left out because they could not be embedded.
    """

    part: PartId
    taken: int
    rows: int
    texts: int
    tokens: int
    bad: tuple[BadRow, ...] = ()


class State:
    """The state folder of one backfill. Its calls block: they belong on a thread.

    Args:
        folder: `OUT.backfill`.
        manifest: what the backfill is, in JSON's types: input files, options, model, output, `part_rows`.

    Raises:
        Misconfigured: the folder belongs to a backfill of something else; the message says what differs.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        if not path.exists():
            write_whole(path, json.dumps(manifest, indent=1).encode())
        self._claims = os.open(folder / "claims", os.O_RDWR | os.O_CREAT, 0o600)

    def is_committed(self, part: PartId) -> bool:
        """Whether a part is done."""
        return self._record_path(part).exists()

    def claim(self, part: PartId) -> bool:
        """Take a part for this process, until it commits, releases, or dies. False: another process has it."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._place(part))
        except OSError:
            return False
        return True

    def release(self, part: PartId) -> None:
        """Give a claimed part back."""
        fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, self._place(part))

    def commit(self, record: PartRecord) -> None:
        """Remember, durably, that a part is done. The part itself is durable by then. Gives its claim back."""
        write_whole(self._record_path(record.part), json.dumps(asdict(record)).encode())
        self.release(record.part)

    def shard_ended(self, shard: int, parts: int, taken: int) -> None:
        """Remember how many parts and rows a shard has: whoever reads to its end finds out."""
        write_whole(self._folder / "parts" / f"{shard:05}.json", json.dumps({"parts": parts, "taken": taken}).encode())

    def parts_of(self, shard: int) -> int | None:
        """How many parts a shard has; None while nobody has read to its end."""
        path = self._folder / "parts" / f"{shard:05}.json"
        return json.loads(path.read_bytes())["parts"] if path.exists() else None

    def missing(self, shards: int) -> tuple[int, ...]:
        """Shards with a part that is not committed, or whose end nobody knows."""
        return tuple(
            shard
            for shard in range(shards)
            if (parts := self.parts_of(shard)) is None
            or not all(self.is_committed(PartId(shard, chunk)) for chunk in range(parts))
        )

    def records(self) -> Sequence[PartRecord]:
        """Of all committed parts, in the order of the input."""
        records = []
        for path in sorted((self._folder / "parts").glob("*-*.json")):
            fields = json.loads(path.read_bytes())
            bad = tuple(BadRow(**row) for row in fields.pop("bad"))
            records.append(PartRecord(**fields | {"part": PartId(**fields["part"]), "bad": bad}))
        return records

    def close(self) -> None:
        """Give all claims back."""
        os.close(self._claims)

    def _record_path(self, part: PartId) -> Path:
        return self._folder / "parts" / f"{part.name}.json"

    @staticmethod
    def _place(part: PartId) -> int:
        return part.shard * 1_000_000 + part.chunk


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole and durable, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
