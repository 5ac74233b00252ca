"""The flags of `embedstream jobs`: which backfills there are, and how far they have come. Light to import."""

from __future__ import annotations

from typing import Annotated

import typer

from embedstream.shared.settings import Settings


def jobs(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> int:
    """Show backfills: those begun on this machine by this user, and those that run on the queue, wherever.

    A table on a terminal; elsewhere columns with tabs between them: id, state, rows done, rows in all, rows a second,
    seconds left, bad rows, OUT, when it began, and the command that goes on where one was stopped. It needs no server.
    """
    from .jobs_list import show

    return show(settings, as_json=as_json)
