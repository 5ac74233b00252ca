"""What reached the devices, from the journal the toy consumers write before they compute."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from embedstream.shared.lanes import Lane


@dataclass(frozen=True)
class Run:
    """A row in a batch.

    Args:
        row: request id, job and row: what names it.
        number: of the request within its deployment.
        deaths: consumers that had died with its job before.
        lane: where the job was read.
        consumer: who ran it.
        at_s: Unix time.
        batch_rows: rows of the batch.
    """

    row: tuple[str, int, int]
    number: int
    deaths: int
    lane: str
    consumer: str
    at_s: float
    batch_rows: int


@dataclass(frozen=True)
class Batch:
    """One pass of a device."""

    at_s: float
    consumer: str
    tokens: int
    runs: tuple[Run, ...]

    def has(self, lane: Lane) -> bool:
        """Whether rows of a lane are in it."""
        return any(run.lane == lane for run in self.runs)


class Journal:
    """The file, read anew for each question."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes of it: they grow with every pass."""
        return self.path.stat().st_size if self.path.exists() else 0

    def batches(self) -> list[Batch]:
        """Every pass, in the order they began."""
        if not self.path.exists():
            return []
        return [_batch(json.loads(line)) for line in self.path.read_text().splitlines()]

    def runs(self) -> list[Run]:
        """Every row of every pass."""
        return [run for batch in self.batches() for run in batch.runs]

    def duplicates(self, runs: list[Run] | None = None) -> tuple[int, int]:
        """Runs beyond one for each row, and rows."""
        seen = Counter(run.row for run in (self.runs() if runs is None else runs))
        return seen.total() - len(seen), len(seen)


def _batch(line: dict[str, object]) -> Batch:
    rows: list[list[object]] = line["rows"]  # type: ignore[assignment] # as the toy consumer writes it
    at_s, consumer = float(str(line["at_s"])), str(line["consumer"])
    runs = tuple(
        Run(
            (str(request), int(str(job)), int(str(row))),
            int(str(number)),
            int(str(deaths)),
            str(lane),
            consumer,
            at_s,
            len(rows),
        )
        for request, job, row, deaths, lane, number in rows
    )
    return Batch(at_s, consumer, int(str(line["tokens"])), runs)
