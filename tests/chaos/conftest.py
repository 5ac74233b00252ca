"""Fixtures of the scenarios, and their table at the end of a run."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from .deployment import Sites
from .report import Report
from .trial import Trial, new_trial
from .trial_of_backfill import PROPERTY, BackfillTrial, new_backfill_trial


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write` puts the table into docs/reliability.md."""
    parser.addoption("--write", action="store_true", help="chaos: write the table into docs/reliability.md")
    parser.addoption("--seed", type=int, default=1, help="chaos: of the requests and the moments of the faults")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Another one for each test, the same in each run."""
    given: int = request.config.getoption("--seed")
    return given * 100_000 + zlib.crc32(request.node.name.encode()) % 100_000


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> Trial:
    """The row of this test."""
    return new_trial(request)


@pytest.fixture
def backfill_trial(request: pytest.FixtureRequest) -> BackfillTrial:
    """The row of this test in the table of backfills."""
    return new_backfill_trial(request)


@pytest.fixture
def site(tmp_path: Path, seed: int) -> Sites:
    """Makes deployments."""
    return Sites(tmp_path, seed)


_LONGEST_FIRST = ("04", "21", "17", "10", "05", "09", "02", "25", "14", "22", "20", "03", "13")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest scenarios begin first, so that none of them is left alone at the end."""

    def rank(item: pytest.Item) -> int:
        number = item.name.removeprefix("test_")[:2]
        return _LONGEST_FIRST.index(number) if number in _LONGEST_FIRST else len(_LONGEST_FIRST)

    if all(item.get_closest_marker("chaos") for item in items):
        items.sort(key=rank)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables, and write them when that was asked for."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]

    def rows(wanted: str) -> list[tuple[str, bool, dict[str, Any]]]:
        called = [report for report in reports if report.when == "call"]
        properties = [(report, name, row) for report in called for name, row in report.user_properties]
        return [(report.nodeid, report.passed, row) for report, name, row in properties if name == wanted]

    table = Report(rows("chaos"), rows(PROPERTY))
    if not table.rows and not table.backfills:
        return
    terminalreporter.section(f"chaos, --seed {config.getoption('--seed')}")
    terminalreporter.write_line(table.text())
    if config.getoption("--write"):
        terminalreporter.write_line(table.write(config.rootpath / "docs" / "reliability.md"))
