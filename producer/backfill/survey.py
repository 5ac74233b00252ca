"""What the state folder of a backfill tells, for those who do not work on it: nothing is locked, made or changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from embedstream.shared.errors import Misconfigured

from . import manifest as manifests
from .differences import refuse_another
from .drafts import storage
from .existing import holds_something
from .manifest import Manifest, manifest_of
from .options import BackfillOptions
from .outputs import output_of
from .plan import InputFile, shards_of
from .records import Records
from .state import COMPLETE, lies_beside, refuse_foreign, side_file_of


@dataclass(frozen=True, slots=True)
class Survey:
    """How far a backfill has come.

    Args:
        folder: its state folder.
        manifest: what it is.
        taken: rows of the input that committed parts stand for.
        total: rows of the input, where it is known.
        rows: rows in the output.
        bad_rows: rows that were left out because they could not be embedded.
        is_complete: whether every part is committed and the output whole.
    """

    folder: Path
    manifest: Manifest
    taken: int
    total: int | None
    rows: int
    bad_rows: int
    is_complete: bool

    @property
    def side_file(self) -> Path:
        """Where its bad rows are told, if it has any."""
        return side_file_of(self.folder, output_of(self.manifest.output))


def survey(folder: Path) -> Survey | None:
    """Look at a state folder; None where there is none.

    Raises:
        Misconfigured: it is damaged, or of a newer embedstream.
        Unavailable: it cannot be read.
    """
    with storage(folder):
        try:
            manifest = Manifest.decode((folder / manifests.NAME).read_bytes(), folder / manifests.NAME)
            records = Records(folder / "parts")
            parts = records.all()
        except FileNotFoundError:
            return None
        done = (folder / COMPLETE).exists()
        taken = sum(record.taken for record in parts)
        return Survey(
            folder,
            manifest,
            taken,
            taken if done else _total(manifest, records),
            sum(record.rows for record in parts),
            sum(record.bad_rows for record in parts),
            done,
        )


def finished(
    options: BackfillOptions, files: Sequence[InputFile], carried: pa.Schema, models: Collection[str] = ()
) -> Survey | None:
    """What is there of a backfill, if all of it is done: then neither a model nor a server is needed to say so.

    Args:
        options: what is asked for.
        files: of the input, as they are now.
        carried: the carried columns.
        models: names of the model that is asked for; empty where any will do.

    Returns:
        None where there is something to do.

    Raises:
        Misconfigured: the state folder belongs to another backfill, or is damaged, or its output is gone. What the
            model changes is not seen here.
    """
    output = output_of(options.output)
    folder = options.state or output.state_folder
    found = survey(folder)
    if found is None:
        refuse_foreign(output, folder)  # now, and not when a model has been loaded
        return None
    asked = manifest_of(options, files, carried)
    model = found.manifest.model.get("embedstream.model", "")
    if models and model not in models:
        asked = replace(asked, model={"embedstream.model": next(iter(models))})
    refuse_another(found.manifest, asked, folder, moved=lies_beside(folder, output))
    if found.is_complete and holds_something(output) is False:
        raise Misconfigured(
            f"{output.shown} is gone, and {folder} says that all of it was written: bring it back, or remove that "
            "folder too, to begin anew."
        )
    return found if found.is_complete else None


def _total(manifest: Manifest, records: Records) -> int | None:
    """Rows of the input: as the files said when it began, or as those who read to the ends found."""
    total = 0
    for shard in shards_of(manifest.files, manifest.shard_bytes):
        end = records.end_of(shard.number)
        rows = shard.n_rows if end is None else end.taken
        if rows is None:
            return None
        total += rows
    return total
