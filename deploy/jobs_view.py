"""How backfills are shown: a table, columns, JSON. What strangers wrote never reaches a terminal as it is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .dead_letter_view import printable

if TYPE_CHECKING:
    from .jobs_list import Backfill

_SHORT_ID_DIGITS = 8
_COLUMNS = ("id", "state", "rows", "rows/s", "left", "bad rows", "OUT", "age")
_MAYBE_EMPTY = {"rows/s", "left", "bad rows"}
_WRAPPED = {"state", "OUT"}
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def summary(one: Backfill) -> dict[str, Any]:
    """All that is known of a backfill; unknown is None."""
    return {
        "id": one.id,
        "state": one.state,
        "processes": [
            {"host": beat.host, "pid": beat.pid, "rows_per_s": round(beat.rows_per_s, 1), "doing": beat.doing}
            for beat in one.beats
        ],
        "rows_done": one.taken,
        "rows_total": one.total,
        "rows_per_s": round(one.rows_per_s, 1) if one.beats else None,
        "left_s": None if one.left_s is None else round(one.left_s, 1),
        "bad_rows": one.bad_rows,
        "out": one.out,
        "began": one.began,
        "state_folder": str(one.survey.folder) if one.survey else None,
        "resume": resume(one) or None,
    }


def columns(one: Backfill) -> str:
    """One line with tabs between its columns; unknown is empty."""
    said = summary(one) | {"state": state(one)}
    order = ("id", "state", "rows_done", "rows_total", "rows_per_s", "left_s", "bad_rows", "out", "began", "resume")
    values = [said[name] for name in order]
    return "\t".join("" if value is None else printable(str(value)) for value in values)


def state(one: Backfill) -> str:
    """What it does, in words."""
    if one.state == "complete" and one.bad_rows:
        return "complete with bad rows"
    return _at_work(one)


def _at_work(one: Backfill) -> str:
    more = f", {len(one.beats)} processes" if len(one.beats) > 1 else ""
    doing = next((f" ({beat.doing})" for beat in one.beats if beat.doing), "")
    return f"{one.state}{more}{doing}"


def resume(one: Backfill) -> str:
    """What to type to go on with it; "" while it runs, and where it is complete or nobody knows."""
    if one.state != "stopped" or not one.command:
        return ""
    return f"cd {shlex.quote(one.folder or '.')} && {shlex.join(one.command)}"


def table(found: Sequence[Backfill], now: datetime) -> Table:
    """A table for a terminal; columns that would be empty leave their room to `OUT`."""
    rows = [_cells(one, now) for one in found]
    kept = [place for place, name in enumerate(_COLUMNS) if name not in _MAYBE_EMPTY or any(row[place] for row in rows)]
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in (_COLUMNS[place] for place in kept):
        if name in _WRAPPED:
            drawn.add_column(name, overflow="fold")
        else:
            drawn.add_column(name, no_wrap=True, justify="left" if name == "id" else "right")
    for row in rows:
        drawn.add_row(*(Text(row[place]) for place in kept))
    return drawn


def print_table(found: Sequence[Backfill], console: Console | None = None, now: datetime | None = None) -> None:
    """Print the table on the terminal, and below it what goes on with those that were stopped."""
    console = console or Console(highlight=False)
    console.print(table(found, now or datetime.now(UTC)))
    stopped = [one for one in found if resume(one)]
    if stopped:
        console.print("\nTo go on:", style="bold")
    for one in stopped:
        # Not wrapped by us: a line that the terminal wraps is still one when it is copied.
        console.print(Text(f"  {printable(resume(one))}"), soft_wrap=True)


def span(seconds: float) -> str:
    """A time, to about two digits: `45 s`, `12 min`, `3 h 5 min`."""
    whole = max(0, round(seconds))
    for (size, unit), smaller in zip(_UNITS, [*_UNITS[1:], None], strict=True):
        if whole >= size or smaller is None:
            count, rest = divmod(whole, size)
            below = rest // smaller[0] if smaller is not None and unit in {"d", "h"} else 0
            return f"{count} {unit}" + (f" {below} {smaller[1]}" if smaller is not None and below else "")
    return ""


def _cells(one: Backfill, now: datetime) -> tuple[str, ...]:
    of = "" if one.total is None else f" of {one.total:,}"
    return (
        one.id[:_SHORT_ID_DIGITS],
        printable(_at_work(one)),  # bad rows have a column here
        f"{one.taken:,}{of}",
        f"{one.rows_per_s:,.0f}" if one.beats else "",
        "" if one.left_s is None else span(one.left_s),
        f"{one.bad_rows:,}" if one.bad_rows else "",
        printable(one.out),
        span((now - datetime.fromisoformat(one.began)).total_seconds()) if one.began else "",
    )
