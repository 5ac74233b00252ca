"""What a backfill remembers: its manifest, which parts are committed, and who works on which.

All of it lies in a folder beside the output, `OUT.backfill`. A record is written under a temporary name, made durable
and renamed, after the part itself: a part without a record is simply made again, under the same name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from embedstream.shared.errors import Misconfigured

from . import manifest as manifests
from .blocks import BadRow
from .claims import BEGINNING, Claims
from .differences import refuse_another
from .drafts import storage, sweep, write_whole
from .existing import holds_something
from .manifest import Manifest
from .outputs import Kind, Output
from .plan import PartId
from .records import PartRecord, Records, ShardEnd
from .side_file import SideFile

COMPLETE = "complete.json"


class State:
    """The state folder of one backfill. Its calls block: they belong on threads, and any thread may make them.

    The process that comes first writes down what the backfill is; every other is held against that.

    Args:
        folder: `OUT.backfill`.
        manifest: of what is asked for.
        output: where it goes; the side file lies beside a local one, and in the folder else. None: nobody looks at it.

    Raises:
        Misconfigured: the folder belongs to a backfill of something else; the message says what differs. Or the output
            is not the one that belongs to the folder; or the folder cannot be written; or this process has it open.
        Unavailable: the disk is full; any call may find that out.
    """

    def __init__(self, folder: Path, manifest: Manifest, output: Output | None = None) -> None:
        self._folder = folder
        self._where = f"the state folder {folder}"
        parts = folder / "parts"
        self.beats = folder / "running"
        """Where processes say that they run."""
        if output is not None:
            refuse_foreign(output, folder)  # before there is a folder
        with storage(self._where):
            for some in (parts, self.beats):
                some.mkdir(parents=True, exist_ok=True)
            self._claims = Claims(folder / "claims")
        self._records = Records(parts)
        self._side_file = SideFile(side_file_of(folder, output), self._records, self._claims)
        try:
            with storage(self._where):
                self.manifest = self._agreed(manifest, output)
                for some in (folder, parts, self.beats):
                    sweep(some)
                self._side_file.sweep()
        except BaseException:
            self._claims.close()
            raise

    @property
    def is_complete(self) -> bool:
        """Whether `finish` was called, by any process."""
        return (self._folder / COMPLETE).exists()

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

    def finish(self) -> None:
        """Remember that every part is committed and the output whole; the side file is up to date by then.

        Whoever finds that remembered does nothing any more: a side file that is behind would stay so.
        """
        self.write_side_file()
        ended = {"ended": datetime.now(UTC).isoformat(timespec="seconds")}
        with storage(self._where):
            write_whole(self._folder / COMPLETE, json.dumps(ended).encode())

    def close(self) -> None:
        """Give all claims back."""
        self._claims.close()

    def _agreed(self, manifest: Manifest, output: Output | None) -> Manifest:
        """The manifest of the folder, which is this one where there was none."""
        path = self._folder / manifests.NAME
        with self._claims.alone(BEGINNING):
            if not path.exists():
                self._refuse_leftovers(path)
                write_whole(path, manifest.encode())
                return manifest
        found = manifests.Manifest.decode(path.read_bytes(), path)
        refuse_another(found, manifest, self._folder, moved=output is None or lies_beside(self._folder, output))
        if output is not None:
            self._refuse_lost(output)
        return found

    def _refuse_leftovers(self, path: Path) -> None:
        if self._records.all() or self.is_complete:
            raise Misconfigured(
                f"{path} is gone, and without it nobody knows what the other files there belong to: bring it back from "
                f"a copy, or remove {self._folder} and the output, to begin anew."
            )

    def _refuse_lost(self, output: Output) -> None:
        has_parts = output.kind is Kind.FOLDER and any(record.rows for record in self._records.all())
        if (self.is_complete or has_parts) and holds_something(output) is False:
            raise Misconfigured(
                f"{output.shown} is gone, and {self._folder} says that rows were written there: bring it back, or "
                "remove that folder too, to begin anew."
            )


def side_file_of(folder: Path, output: Output | None) -> Path:
    """Where the side file of bad rows lies: beside a local output, else in the state folder."""
    return Path(f"{output.location}.bad-rows.jsonl") if output and output.is_local else folder / "bad-rows.jsonl"


def paths_of(folder: Path, output: Output) -> tuple[str, ...]:
    """All that a backfill writes, as files of an input are called: where it lies within the input, it is none of it."""
    mine = [folder, side_file_of(folder, output)]
    if output.is_local:
        mine.append(Path(output.location))
        if output.kind is Kind.FILE and output.format == "npy":
            mine.append(Path(f"{output.location.removesuffix('.npy')}.ids.parquet"))
    remote = [output.shown] if output.kind in {Kind.FILE, Kind.FOLDER} and not output.is_local else []
    return (*(os.path.abspath(path) for path in mine), *remote)  # noqa: PTH100 # as the files of an input are named


def lies_beside(folder: Path, output: Output) -> bool:
    """Whether a state folder lies beside its output, so that the two may be moved together.

    That of a database or of an object store is only named after a table or a folder there, of which others may have
    one of the same name.
    """
    return output.is_local and folder.absolute() == output.state_folder.absolute()


def refuse_foreign(output: Output, folder: Path) -> None:
    """Refuse an output that holds something which no backfill of this state folder has written.

    Raises:
        Misconfigured: it does.
    """
    # In this order: another process may be about to begin, and writes down what it does before it does anything.
    if holds_something(output) and not (folder / manifests.NAME).exists():
        raise Misconfigured(
            f"{output.shown} holds something already, and there is no {folder} that tells of a backfill to it: choose "
            "another OUT, or remove what is there if nobody needs it."
        )
