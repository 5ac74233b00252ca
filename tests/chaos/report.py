"""The table: one line a scenario, on the terminal and in docs/reliability.md."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedstream.deploy.embedded import find_server

BEGIN, END = "<!-- table: make chaos ARGS=--write -->", "<!-- end of table -->"
_HEADS = (
    "scenario", "rounds", "void", "requests", "ok", "refused", "timeouts", "hung", "wrong", "lost", "duplicates %",
    "worst wait s", "recovery s",
)  # fmt: skip


class Report:
    """Rows of all scenarios that ran.

    Args:
        rows: node id, whether it passed, and the row of each.
    """

    def __init__(self, rows: Sequence[tuple[str, bool, dict[str, Any]]]) -> None:
        self.rows = sorted(rows, key=lambda row: row[0])

    def _cells(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [_HEADS]
        for _, passed, row in self.rows:
            if row["red_as_meant"]:
                continue
            name = row["scenario"].rstrip(".") + ("" if passed else " — FAILED")
            counts = ("rounds", "void", "requests", "ok", "refused", "timeouts", "hung", "wrong", "lost")
            times = [f"{row[key]:.1f}" for key in ("duplicates_percent", "worst_wait_s", "recovery_s")]
            lines.append((name, *(f"{row[key]:,}" for key in counts), *times))
        return lines

    def _ablations(self) -> list[tuple[str, ...]]:
        red = [(row["scenario"].rstrip("."), row["red_as_meant"]) for _, _, row in self.rows if row["red_as_meant"]]
        return [("taken out", "what the oracle then reports"), *red]

    def text(self) -> str:
        """For a terminal."""
        return "\n\n".join(_aligned(lines) for lines in (self._cells(), self._ablations()) if len(lines) > 1)

    def write(self, page: Path) -> str:
        """Put it between the marks of a page; returns what was done."""
        failed = [node for node, passed, _ in self.rows if not passed]
        if failed:
            return f"not written: {len(failed)} failed"
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        body = "\n\n".join([_circumstances(), _markdown(self._cells(), 1), _markdown(self._ablations(), 2)])
        page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
        return f"written to {page}"


def _circumstances() -> str:
    server = ".".join(map(str, find_server().version))
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}, redis-py {version('redis')}, Valkey {server}; `make chaos`."
    )


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _markdown(lines: list[tuple[str, ...]], left: int) -> str:
    rule = " | ".join("---" if column < left else "---:" for column in range(len(lines[0])))
    head, *rest = (" | ".join(line) for line in lines)
    return "\n".join(f"| {line} |" for line in (head, rule, *rest))
