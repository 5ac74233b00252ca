"""What is known of the parts that are committed: a small file for each, read once.

    parts/00000-000003.json        a part: its counts
    parts/00000-000003.bad.jsonl   its bad rows, where it has any; written before the record, and part of it
    parts/00000.json               a shard: how many parts and rows it has

Several processes write here, each the records of its own parts; what others have done is found by a look at the names.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

from embedstream.shared.errors import Misconfigured
from embedstream.shared.logs import get_logger

from .blocks import BadRow
from .drafts import write_whole
from .plan import PartId

log = get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What is known of a committed part.

    Args:
        part: which one.
        taken: rows of the input it stands for.
        rows: rows in the output.
        texts: unique texts that were computed for it.
        tokens: of those.
        bad_rows: rows left out because they could not be embedded.
    """

    part: PartId
    taken: int
    rows: int
    texts: int
    tokens: int
    bad_rows: int = 0


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """How large a shard turned out to be.

    Args:
        parts: of it.
        taken: rows of the input it stands for.
    """

    parts: int
    taken: int


class Records:
    """The records of one backfill. Any thread may ask; calls block.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[PartId, PartRecord] = {}
        self._ends: dict[int, ShardEnd] = {}
        self._committed: Counter[int] = Counter()
        self._names: set[str] = set()
        self._unreadable: set[str] = set()
        self._lock = Lock()

    def has(self, part: PartId) -> bool:
        """Whether a part is committed, by any process."""
        with self._lock:
            if part not in self._parts and (self._folder / f"{part.name}.json").exists():
                self._read(f"{part.name}.json")
            return part in self._parts

    def add(self, record: PartRecord, bad: Iterable[BadRow]) -> None:
        """Write down a part, with its bad rows in order. The part itself is durable by then."""
        lines = [json.dumps(_as_json(row)) + "\n" for row in bad]
        if lines:
            write_whole(self.bad_rows_of(record.part), "".join(lines).encode())
        fields = asdict(record)
        del fields["part"]
        write_whole(self._folder / f"{record.part.name}.json", json.dumps(fields).encode())
        with self._lock:
            self._keep(record)

    def add_end(self, shard: int, end: ShardEnd) -> None:
        """Write down where a shard ends.

        Raises:
            Misconfigured: somebody came to another end: the input has changed meanwhile.
        """
        known = self.end_of(shard)
        if known is None:
            write_whole(self._folder / f"{shard:05}.json", json.dumps(asdict(end)).encode())
            with self._lock:
                self._keep_end(shard, end)
        elif known != end:
            raise Misconfigured(
                f"The input changed while it was read: shard {shard} had {known.taken} rows and now has {end.taken}. "
                "What is written so far may not fit together: begin anew with another OUT."
            )

    def end_of(self, shard: int) -> ShardEnd | None:
        """Where a shard ends; None while nobody has read so far."""
        with self._lock:
            if shard not in self._ends and (self._folder / f"{shard:05}.json").exists():
                self._read(f"{shard:05}.json")
            return self._ends.get(shard)

    def missing(self, n_shards: int) -> tuple[int, ...]:
        """Shards with a part that is not committed, or whose end nobody knows."""
        with self._lock:
            self._look()
            return tuple(
                shard
                for shard in range(n_shards)
                if (end := self._ends.get(shard)) is None or self._committed[shard] < end.parts
            )

    def all(self) -> list[PartRecord]:
        """Those of all processes, in the order of the input."""
        with self._lock:
            self._look()
            return [self._parts[part] for part in sorted(self._parts)]

    def bad_rows_of(self, part: PartId) -> Path:
        """The file of a part's bad rows."""
        return self._folder / f"{part.name}.bad.jsonl"

    def _look(self) -> None:
        """Read what is new."""
        with os.scandir(self._folder) as entries:
            new = sorted({entry.name for entry in entries} - self._names)
        for name in new:
            self._read(name)

    def _read(self, name: str) -> None:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?\.json", name)
        if found is None:
            return
        if found[2] is None:
            end = self._load(name, lambda fields: ShardEnd(**fields))
            if end is not None:
                self._keep_end(int(found[1]), end)
        else:
            part = PartId(int(found[1]), int(found[2]))
            record = self._load(name, lambda fields: self._whole(PartRecord(part, **fields)))
            if record is not None:
                self._keep(record)

    def _whole(self, record: PartRecord) -> PartRecord:
        if record.bad_rows and not self.bad_rows_of(record.part).exists():
            raise ValueError("its bad rows are gone")
        return record

    def _load(self, name: str, make: Callable[[Mapping[str, int]], T]) -> T | None:
        try:
            return make(json.loads((self._folder / name).read_bytes()))
        except (ValueError, TypeError) as error:
            # A disk may lose what it had promised to keep. The part is made again, which replaces the record.
            if name not in self._unreadable:
                log.warning("backfill.damaged_record", file=str(self._folder / name), error=type(error).__name__)
            self._unreadable.add(name)
            return None

    def _keep(self, record: PartRecord) -> None:
        self._committed[record.part.shard] += record.part not in self._parts
        self._parts[record.part] = record
        self._names.add(f"{record.part.name}.json")

    def _keep_end(self, shard: int, end: ShardEnd) -> None:
        self._ends[shard] = end
        self._names.add(f"{shard:05}.json")


def _as_json(row: BadRow) -> dict[str, object]:
    return {"file": row.file, "row": row.row, "id": row.id, "reason": row.reason.value, "message": row.message}
