"""The tables: one line a scenario, on the terminal and in docs/reliability.md."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedstream.deploy.embedded import find_server

from .trial_of_backfill import BackfillRow

BEGIN, END = "<!-- table: make chaos ARGS=--write -->", "<!-- end of table -->"
_HEADS = (
    "scenario", "rounds", "void", "requests", "ok", "refused", "timeouts", "hung", "wrong", "lost", "duplicates %",
    "worst wait s", "recovery s",
)  # fmt: skip
_BACKFILL_HEADS = ("scenario of backfills", "jobs", "kills", "rows", "bad rows", "texts", "texts again %")


class Report:
    """Rows of all scenarios that ran.

    Args:
        rows: node id, whether it passed, and the row of each.
        backfills: likewise, of backfills.
    """

    def __init__(
        self,
        rows: Sequence[tuple[str, bool, dict[str, Any]]],
        backfills: Sequence[tuple[str, bool, dict[str, Any]]] = (),
    ) -> None:
        self.rows = sorted(rows, key=lambda row: row[0])
        self.backfills = sorted(backfills, key=lambda row: row[0])

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

    def _of_backfills(self) -> list[tuple[str, ...]]:
        sums: dict[str, BackfillRow] = {}
        for _, passed, fields in self.backfills:
            row = BackfillRow(**fields)
            row.scenario += "" if passed else " — FAILED"
            sums[row.scenario] = sums[row.scenario] + row if row.scenario in sums else row
        return [_BACKFILL_HEADS, *(_backfill_cells(row) for row in sums.values())]

    def text(self) -> str:
        """For a terminal."""
        tables = self._cells(), self._of_backfills(), self._ablations()
        return "\n\n".join(_aligned(lines) for lines in tables if len(lines) > 1)

    def write(self, page: Path) -> str:
        """Put it between the marks of a page; returns what was done."""
        failed = [node for node, passed, _ in [*self.rows, *self.backfills] if not passed]
        if failed:
            return f"not written: {len(failed)} failed"
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        tables = _markdown(self._cells(), 1), _markdown(self._of_backfills(), 1), _markdown(self._ablations(), 2)
        body = "\n\n".join([_circumstances(), *tables])
        page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
        return f"written to {page}"


def _backfill_cells(row: BackfillRow) -> tuple[str, ...]:
    again_percent = 100 * row.again / max(1, row.texts)
    counts = row.jobs, row.kills, row.rows, row.bad_rows, row.texts
    return (row.scenario, *(f"{count:,}" for count in counts), f"{again_percent:.1f}")


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
