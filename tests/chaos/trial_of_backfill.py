"""The trial of a backfill, and its row in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from .backfills import Backfill

PROPERTY = "backfill"


@dataclass
class BackfillRow:
    """A scenario's row of the table; scenarios of one name are added up.

    Args:
        scenario: what is done to the backfill.
        jobs: backfills that were run, each to its end.
        kills: of any process.
        rows: in the outputs, each held against what it must be.
        bad_rows: told of.
        texts: that had to be computed.
        again: rows on a device beyond one for each text.
    """

    scenario: str
    jobs: int = 0
    kills: int = 0
    rows: int = 0
    bad_rows: int = 0
    texts: int = 0
    again: int = 0

    def __add__(self, other: BackfillRow) -> BackfillRow:
        """The row of both."""
        names = ("jobs", "kills", "rows", "bad_rows", "texts", "again")
        return BackfillRow(self.scenario, **{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass
class BackfillTrial:
    """Keeps the row, and shows what the processes said when something is broken.

    Args:
        row: of the table.
        save: takes the row.
    """

    row: BackfillRow
    save: Callable[[dict[str, Any]], None]

    @contextmanager
    def on(self, job: Backfill, what: str = "") -> Iterator[None]:
        """Run a job; when it fails, show its seed, what was done and what its processes said."""
        try:
            yield
        except AssertionError as error:
            self.save(asdict(self.row))
            error.add_note(f"seed {job.here.seed} {what}, {job.here.folder}\n{job.here.log_tails()}")
            raise

    def done(self, job: Backfill, kills: int = 0) -> None:
        """Count a job in that came out right."""
        made = job.corpus
        again = job.computed_again()
        self.row += BackfillRow(self.row.scenario, 1, kills, len(made.good), len(made.bad), made.n_unique, again)
        self.save(asdict(self.row))


def new_backfill_trial(request: pytest.FixtureRequest) -> BackfillTrial:
    """The trial of a test; its row is named after the first line of the test's docstring."""
    name = (request.function.__doc__ or request.node.name).strip().splitlines()[0].rstrip(".")
    properties = request.node.user_properties

    def save(row: dict[str, Any]) -> None:
        properties[:] = [one for one in properties if one[0] != PROPERTY] + [(PROPERTY, row)]

    return BackfillTrial(BackfillRow(name), save)
