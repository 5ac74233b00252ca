"""A trial: rounds of one fault, of which only those count in which the fault bit, and one row of the table."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from .deployment import Deployment
from .ledger import Ledger, Line, Outcome

ROUNDS = 5
_SHOWN = 10


@dataclass(frozen=True)
class Round:
    """What one round showed.

    Args:
        ledger: all of its requests.
        bit: whether the fault did what it was to do; if not, the round is void.
        recovery_s: from the fault, or from its end, until all was well again.
    """

    ledger: Ledger
    bit: bool = True
    recovery_s: float = 0.0


@dataclass
class Row:
    """A scenario's row of the table: sums and maxima over its biting rounds."""

    scenario: str
    requests: int = 0
    rounds: int = 0
    void: int = 0
    ok: int = 0
    refused: int = 0
    timeouts: int = 0
    hung: int = 0
    wrong: int = 0
    lost: int = 0
    duplicates_percent: float = 0.0
    worst_wait_s: float = 0.0
    recovery_s: float = 0.0
    red_as_meant: str = ""


class Broken(AssertionError):
    """A round broke a promise."""


@dataclass
class Trial:
    """Runs rounds and keeps the row.

    Args:
        row: of the table.
        save: takes the finished row.
    """

    row: Row
    save: Callable[[dict[str, Any]], None]
    _executions: list[tuple[int, int]] = field(default_factory=list)

    async def repeat(self, once: Callable[[], Awaitable[Round]], rounds: int = ROUNDS) -> None:
        """Repeat a round until the fault has bitten so often; void rounds are repeated, but not for ever."""
        while self.row.rounds < rounds:
            self.add(await once())
            assert self.row.void <= rounds, f"the fault did not bite in {self.row.void} rounds"

    def add(self, done: Round) -> None:
        """Count a round in, and check that it broke no promise."""
        if not done.bit:
            self.row.void += 1
        else:
            self.row.rounds += 1
            self.row.recovery_s = max(self.row.recovery_s, done.recovery_s)
        self._count(done.ledger)
        self.finish()
        check(done.ledger)

    def _count(self, ledger: Ledger) -> None:
        row = self.row
        row.requests += len(ledger.lines)
        row.ok += ledger.count(Outcome.OK)
        row.refused += ledger.count(Outcome.REFUSED)
        row.timeouts += ledger.count(Outcome.TIMEOUT)
        row.hung += ledger.count(Outcome.HUNG)
        row.wrong += ledger.count(Outcome.WRONG)
        row.lost += len(ledger.lost())
        row.worst_wait_s = max(row.worst_wait_s, ledger.worst_s())

    @contextmanager
    def on(self, site: Deployment) -> Iterator[Trial]:
        """Run rounds on a deployment: count its duplicates in the end; when it fails, show what its processes said."""
        try:
            yield self
        except AssertionError as error:
            error.add_note(f"seed {site.seed}, {site.folder}\n{site.log_tails()}")
            raise
        finally:
            self._executions.append(site.journal.duplicates())
            self.finish()

    def finish(self) -> None:
        """Save the row as it is now."""
        again, rows = map(sum, zip(*self._executions, strict=True)) if self._executions else (0, 0)
        self.row.duplicates_percent = 100 * again / max(1, rows)
        self.save(asdict(self.row))

    def recovered(self, seconds: float, most_s: float, what: str) -> float:
        """Check a bound on time; returns the time."""
        if seconds > most_s:
            raise Broken(f"{what}: {seconds:.2f} s, at most {most_s:g} s were promised")
        return seconds


def check(ledger: Ledger) -> None:
    """Check that no request hung, got wrong vectors or was lost.

    Raises:
        Broken: naming them.
    """
    for what, lines in (
        ("hung", ledger.of(Outcome.HUNG)),
        ("wrong", ledger.of(Outcome.WRONG)),
        ("lost", ledger.lost()),
    ):
        if lines:
            raise Broken(f"{len(lines)} of {len(ledger.lines)} requests {what}:\n{_listed(lines)}")


def _listed(lines: list[Line]) -> str:
    now_s = time.monotonic()
    shown = [f"  {line}, sent {now_s - line.sent_s:.1f} s ago" for line in lines[:_SHOWN]]
    return "\n".join([*shown, *(["  …"] if len(lines) > _SHOWN else [])])


def new_trial(request: pytest.FixtureRequest) -> Trial:
    """The trial of a test; its row is named after the first line of the test's docstring."""
    name = (request.function.__doc__ or request.node.name).strip().splitlines()[0]
    properties = request.node.user_properties

    def save(row: dict[str, Any]) -> None:
        properties[:] = [one for one in properties if one[0] != "chaos"] + [("chaos", row)]

    return Trial(Row(name), save)
