"""How dead letters are shown: a table, columns, JSON. What strangers wrote never reaches a terminal as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedstream.shared import jobs
from embedstream.shared.errors import MalformedJob
from embedstream.shared.jobs import Job

from .dead_letter_store import DeadLetter

WIDE_COLUMNS = 120
"""A terminal from here on shows request ids in full."""
_SHORT_ID_DIGITS = 8


def summary(letter: DeadLetter) -> dict[str, Any]:
    """What `list` tells of a dead letter; unknown is None."""
    sender = letter.sender
    return {
        "id": letter.id,
        "when": iso(letter.when),
        "lane": letter.lane,
        "request_id": sender.request_id.hex() if sender else None,
        "job": sender.job if sender else None,
        "n_jobs": sender.n_jobs if sender else None,
        "inputs": sender.n_inputs if sender else None,
        "tokens": letter.tokens,
        "deaths": letter.deaths,
        "reason": letter.reason,
    }


def details(letter: DeadLetter, body: bytes, *, texts: bool) -> dict[str, Any]:
    """What `show` tells; the texts only when they are asked for."""
    said: dict[str, Any] = {
        **summary(letter),
        "suspected_input": letter.row,
        "entry_id": letter.source,
        "reply_stream": letter.reply_to,
        "header_bytes": len(letter.header),
        "body_bytes": len(body),
    }
    try:
        job = jobs.decode(letter.header, body)
    except MalformedJob as error:
        return said | {"malformed": str(error)}
    said |= _of_job(job)
    return said | {"texts": list(job.texts)} if texts and job.texts is not None else said


def _of_job(job: Job) -> dict[str, Any]:
    return {
        "form": "token ids" if job.texts is None else "text",
        "fingerprint": job.fingerprint.hex(),
        "header_lane": job.lane,
        "first_input": job.first_input,
        "lengths": job.lengths.tolist(),
        "ttl_ms": job.ttl_ms,
        "result_ttl_s": job.result_ttl_s,
        "dimensions": job.options.dimensions,
        "normalize": job.options.normalize,
        "dtype": job.options.dtype,
        "per_token": job.options.per_token,
        "long_inputs": job.long_inputs.name.lower(),
        "truncate_to": job.truncate_to,
        "truncation_side": job.truncation_side.name.lower(),
        "add_special_tokens": job.add_special_tokens,
        "adapter": job.adapter,
        "prompt_name": job.prompt_name,
        "traceparent": job.traceparent,
        "tenant": job.tenant,
    }


def columns(letter: DeadLetter) -> str:
    """One line with tabs between its columns; unknown is empty."""
    said = summary(letter)
    order = ("id", "when", "lane", "request_id", "place", "inputs", "tokens", "deaths", "reason")
    return "\t".join(_shown((said | {"place": place(letter)})[name]) for name in order)


def table(letters: Iterable[DeadLetter], width: int) -> Table:
    """A table for a terminal of so many columns."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("id\nwhen (UTC)", "lane\nrequest", "job"):
        drawn.add_column(name, no_wrap=True)
    for name in ("inputs\ntokens", "deaths"):
        drawn.add_column(name, no_wrap=True, justify="right")
    drawn.add_column("reason", overflow="fold")
    for letter in letters:
        drawn.add_row(*map(Text, _cells(letter, width)))
    return drawn


def _cells(letter: DeadLetter, width: int) -> Sequence[str]:
    said = summary(letter)
    request = said["request_id"] or ""
    if width < WIDE_COLUMNS and request:
        request = request[:_SHORT_ID_DIGITS] + "…"
    when = f"{letter.when:%Y-%m-%d %H:%M:%S}" if letter.when else ""
    return (
        f"{letter.id}\n{when}",
        f"{_shown(letter.lane)}\n{request}",
        place(letter),
        f"{_counted(said['inputs'])}\n{_counted(said['tokens'])}",
        _shown(letter.deaths),
        printable(letter.reason),
    )


def lines(said: dict[str, Any]) -> Iterable[str]:
    """What `show` prints for people: a line for each thing that is known."""
    width = max(map(len, said))
    if said["n_jobs"] is not None:
        said = said | {"job": _place(said["job"], said["n_jobs"]), "n_jobs": None}
    for name, value in said.items():
        if isinstance(value, list) and value and isinstance(value[0], str):
            yield name
            yield from (f"  {printable(text)}" for text in value)
        elif value is not None and value != "":
            yield f"{name:<{width}}  {_shown(value)}"


def place(letter: DeadLetter) -> str:
    """Which job of its request it is, as people count: `1/3`."""
    sender = letter.sender
    return _place(sender.job, sender.n_jobs) if sender else ""


def printable(text: str) -> str:
    """The text with everything escaped that would move the cursor, break the line or command the terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def iso(when: datetime | None) -> str | None:
    """A time as ISO 8601 in UTC, to the second."""
    return f"{when:%Y-%m-%dT%H:%M:%SZ}" if when else None


def print_table(letters: Sequence[DeadLetter], console: Console | None = None) -> None:
    """Print the table on the terminal."""
    console = console or Console(highlight=False)
    console.print(table(letters, console.width))


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return printable(str(value))


def _place(job: int, n_jobs: int) -> str:
    return f"{job + 1}/{n_jobs}"


def _counted(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
