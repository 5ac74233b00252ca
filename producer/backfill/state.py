"""What a backfill remembers: its manifest, which parts are committed, and who works on which.

All of it lies in a folder beside the output, `OUT.backfill`. A record is written under a temporary name, made durable
and renamed, after the part itself: a part without a record is simply made again, under the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .blocks import BadRow
from .claims import BEGINNING, Claims
from .drafts import storage, sweep, write_whole
from .plan import PartId
from .records import PartRecord, Records, ShardEnd
from .side_file import SideFile

MANIFEST = "manifest.json"


class State:
    """The state folder of one backfill. Its calls block: they belong on threads, and any thread may make them.

    Args:
        folder: `OUT.backfill`.
        manifest: what the backfill is, in JSON's types: input files, options, model, output, `part_rows`.
        bad_rows: where the side file of bad rows goes; None puts it into the folder.

    Raises:
        Misconfigured: the folder belongs to a backfill of something else; the message says what differs. Or it cannot
            be written, or this process has it open already.
        Unavailable: the disk is full; any call may find that out.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], bad_rows: Path | None = None) -> None:
        self._folder = folder
        self._where = f"the state folder {folder}"
        parts = folder / "parts"
        with storage(self._where):
            parts.mkdir(parents=True, exist_ok=True)
            self._claims = Claims(folder / "claims")
        try:
            with storage(self._where):
                with self._claims.alone(BEGINNING):
                    if not (folder / MANIFEST).exists():
                        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
                for some in (folder, parts):
                    sweep(some)
        except BaseException:
            self._claims.close()
            raise
        self._records = Records(parts)
        self._side_file = SideFile(bad_rows or folder / "bad-rows.jsonl", self._records, self._claims)

    @property
    def bad_rows_path(self) -> Path:
        """Where the side file lies, as soon as a row is bad."""
        return self._side_file.path

    def is_committed(self, part: PartId) -> bool:
        """Whether a part is done."""
        with storage(self._where):
            return self._records.has(part)

    def claim(self, part: PartId) -> bool:
        """Take a part for this process, until it commits, releases, or dies. False: another has it, or this one.

        Raises:
            Misconfigured: the input has more parts than can be told apart.
        """
        return self._claims.take(part)

    def release(self, part: PartId) -> None:
        """Give a claimed part back; harmless when it is not claimed."""
        self._claims.give_back(part)

    def commit(self, record: PartRecord, bad: Sequence[BadRow] = ()) -> None:
        """Remember, durably, that a part is done, and give its claim back. The part itself is durable by then.

        Args:
            record: of the part.
            bad: its bad rows, in the order of the input.
        """
        with storage(self._where):
            self._records.add(record, bad)
        self.release(record.part)
        if bad:
            with storage(self.bad_rows_path):
                self._side_file.write_if_due()

    def shard_ended(self, shard: int, parts: int, taken: int) -> None:
        """Remember how many parts and rows a shard has: whoever reads to its end finds out.

        Raises:
            Misconfigured: somebody came to another end: the input has changed meanwhile.
        """
        with storage(self._where):
            self._records.add_end(shard, ShardEnd(parts, taken))

    def parts_of(self, shard: int) -> int | None:
        """How many parts a shard has; None while nobody has read to its end."""
        with storage(self._where):
            end = self._records.end_of(shard)
        return None if end is None else end.parts

    def missing(self, shards: int) -> tuple[int, ...]:
        """Shards with a part that is not committed, or whose end nobody knows."""
        with storage(self._where):
            return self._records.missing(shards)

    def records(self) -> Sequence[PartRecord]:
        """Of all committed parts, by any process, in the order of the input."""
        with storage(self._where):
            return self._records.all()

    def write_side_file(self) -> None:
        """Bring the side file up to date: now, and not only when the next bad row comes."""
        with storage(self.bad_rows_path):
            self._side_file.write()

    def close(self) -> None:
        """Give all claims back."""
        self._claims.close()
