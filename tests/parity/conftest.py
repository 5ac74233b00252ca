"""One thread for torch, and the table at the end of a run."""

from __future__ import annotations

import pytest
import torch

from . import report

_OPTION = "--write-table"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write-table` puts the table into docs/models.md."""
    parser.addoption(_OPTION, action="store_true", help="parity: write the table into docs/models.md")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the table, when that was asked for and all went well."""
    if not config.getoption(_OPTION, default=False):
        return
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line("not written: not all tests passed")
        return
    passed = terminalreporter.stats.get("passed", [])
    report.write([row for done in passed for name, row in done.user_properties if name == report.PROPERTY])
    terminalreporter.write_line(f"written to {report.PAGE}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
