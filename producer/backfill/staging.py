"""The private folder of a sink on this machine: drafts, parts that wait to be joined, and what tells an output ours.

.part-….tmp   drafts, named after their process
parts/        committed parts of an output that becomes one file
begun         the output was empty when the backfill began, so what is there since is ours
joined        the one file is in its place, durable; the staged parts are not needed any more
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from .drafts import draft_of, storage, sweep, write_whole
from .part_format import Format
from .sink import OutputSchema


class Staging:
    """A staging folder; several processes may share it.

    Args:
        folder: made if missing; what dead processes left in it is removed.
    """

    def __init__(self, folder: Path) -> None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        self.folder = folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one process at a time, and one thread of it, go on; the others wait. Ends with the process."""
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def is_marked(self, mark: str) -> bool:
        """Whether `begun` or `joined` holds."""
        return (self.folder / mark).exists()

    def set_mark(self, mark: str) -> None:
        """Remember durably that `begun` or `joined` holds."""
        write_whole(self.folder / mark, b"")

    def drafts(self, names: Sequence[str]) -> tuple[Path, ...]:
        """Where this process writes files that are to get these names."""
        return tuple(draft_of(self.folder / name) for name in names)


class StagedPart:
    """A part that is written to files of this machine first, and delivered whole.

    Args:
        form: of the files.
        schema: of the rows.
        drafts: their paths.
        deliver: brings the finished drafts where they belong, durably; called once.
        where: the output, for messages.
    """

    def __init__(
        self, form: Format, schema: OutputSchema, drafts: Sequence[Path], deliver: Callable[[], None], where: str
    ) -> None:
        self._drafts = drafts
        self._deliver = deliver
        self._where = where
        self._is_committed = False
        with storage(where):
            self._file = form.open(drafts, schema)

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows."""
        with storage(self._where):
            self._file.write(carried, vectors)

    def commit(self) -> None:
        """Deliver it."""
        if self._is_committed:
            return
        with storage(self._where):
            self._file.close()
            self._deliver()
        self._is_committed = True

    def abort(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # the disk may be full; what is being closed is thrown away
            self._file.close()
        with storage(self._where):
            for draft in self._drafts:
                draft.unlink(missing_ok=True)
