"""How the doctor's findings are shown: sections and checks for people, one JSON object for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from io import StringIO, TextIOWrapper
from typing import Any, TextIO

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedstream.consumer.examination import Check, Examination, State

from .dead_letter_view import printable

_MARKS = {State.OK: "✓", State.WARNING: "!", State.FAILED: "✗"}
_STYLES = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red"}
_PIPED_COLUMNS = 10_000
_NONE = "none"


def as_json(found: Examination) -> bytes:
    """All of it as one JSON object in UTF-8."""
    fields = {**found.facts, "checks": found.checks, "against": found.against, "passed": found.passed}
    return orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE, default=asdict)


def show(found: Examination, stdout: TextIO | None = None) -> None:
    """Print it for people; elsewhere than on a terminal nothing is wrapped or coloured."""
    stdout = stdout or sys.stdout
    plain = not (stdout.encoding or "utf-8").lower().startswith("utf")
    if isinstance(stdout, TextIOWrapper):
        stdout.reconfigure(errors="replace")  # what has no UTF-8 shows what it can
    if stdout.isatty():
        _print(found, Console(file=stdout, highlight=False), plain=plain)
        return
    kept = StringIO()
    _print(found, Console(file=kept, highlight=False, width=_PIPED_COLUMNS, color_system=None), plain=plain)
    # Without the padding of its columns.
    stdout.writelines(f"{line.rstrip()}\n" for line in kept.getvalue().splitlines())


def _print(found: Examination, console: Console, *, plain: bool) -> None:
    """The sections, the checks and the verdict; `plain` for files without UTF-8."""
    sections = [(name, _facts_table(facts)) for name, facts in found.facts.items()]
    sections.append(("checks", _checks_table(found.checks, plain=plain)))
    if found.against:
        sections.append(("against sentence-transformers, in float32", _checks_table(found.against, plain=plain)))
    for name, table in sections:
        console.print(Text(name, style="bold"), table, "", sep="\n")
    console.print(_verdict(found))


def _facts_table(facts: Mapping[str, Any]) -> Table:
    table = _table()
    for name, value in facts.items():
        for label, text in _lines(name, value):
            table.add_row(Text(f"  {label}", style="dim"), Text(text))
    return table


def _lines(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A line for each fact; one for each entry of a table."""
    if isinstance(value, dict) and value:
        for place, (key, item) in enumerate(value.items()):
            yield name if place == 0 else "", f"{printable(str(key))}: {_shown(item, quoted=name == 'prompts')}"
    else:
        yield name, _shown(value)


def _shown(value: Any, *, quoted: bool = False) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or _NONE
    if isinstance(value, int):
        return f"{value:,}"
    text = printable(str(value))
    return f'"{text}"' if quoted else text if text and value != {} else _NONE


def _checks_table(checks: Sequence[Check], *, plain: bool) -> Table:
    table = _table(columns=3)
    for check in checks:
        style = _STYLES[check.state]
        mark = check.state.value if plain else _MARKS[check.state]
        table.add_row(Text(f"  {mark}", style=style), Text(check.name), Text(printable(check.found)))
        if check.remedy:
            table.add_row("", "", Text(f"{'>' if plain else '→'} {check.remedy}", style=style))
    return table


def _table(columns: int = 2) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for place in range(columns):
        table.add_column(no_wrap=place < columns - 1, overflow="fold")
    return table


def _verdict(found: Examination) -> Text:
    failed = [check.name for check in (*found.checks, *found.against) if check.state is State.FAILED]
    if failed:
        return Text(f"Not well: {', '.join(failed)}.", style="bold red")
    warned = [check.name for check in (*found.checks, *found.against) if check.state is State.WARNING]
    return Text(f"Well, but see: {', '.join(warned)}." if warned else "All is well.", style="bold")
