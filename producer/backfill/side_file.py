"""The side file: rows that are left out of the output because they could not be embedded, one JSON object a line."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from threading import Lock

from .claims import SIDE_FILE, Claims
from .drafts import draft_of, publish, sweep
from .records import Records

LEAST_BETWEEN_S = 5.0
MOST_OF_THE_TIME = 0.05
"""Between two writings while the work goes on: the file is made anew each time, and must not become the work."""


class SideFile:
    """Made anew of what the committed parts say, so that each row stands in it once, in the order of the input.

    Args:
        path: where it lies; there is no file while no row is bad.
        records: of the committed parts.
        claims: let one process write it at a time.
    """

    def __init__(self, path: Path, records: Records, claims: Claims) -> None:
        self.path = path
        self._records = records
        self._claims = claims
        self._due_s = float("-inf")
        self._lock = Lock()

    def sweep(self) -> None:
        """Remove what processes that were killed have left of it."""
        if self.path.parent.exists():  # a local output may be the first file there
            sweep(self.path.parent, f"{self.path.name}.")

    def write_if_due(self) -> None:
        """Write it, unless that was done a moment ago."""
        if time.monotonic() >= self._due_s:
            self.write()

    def write(self) -> None:
        """Write it as things stand now."""
        began_s = time.monotonic()
        with self._lock, self._claims.alone(SIDE_FILE):
            # Looked at within the lock: whoever writes last has seen the most.
            parts = [record.part for record in self._records.all() if record.bad_rows]
            if not parts:
                self.path.unlink(missing_ok=True)
                return
            draft = draft_of(self.path)
            try:
                with draft.open("wb") as whole:
                    for part in parts:
                        with self._records.bad_rows_of(part).open("rb") as some:
                            shutil.copyfileobj(some, whole)
                publish(draft, self.path)
            finally:
                draft.unlink(missing_ok=True)
        now_s = time.monotonic()
        self._due_s = now_s + max(LEAST_BETWEEN_S, (now_s - began_s) / MOST_OF_THE_TIME)
