"""The flags of `embedstream dead-letters`: jobs that were given up, and what to do with them. Light to import."""

from __future__ import annotations

from typing import Annotated

import typer

from embedstream.shared import flags
from embedstream.shared.lanes import Lane
from embedstream.shared.settings import Role, Settings

MAX_TTL_S = 4_294_967
"""Longest `ttl_ms` of a job's header, in seconds."""
MAX_RESULT_TTL_S = 2**31

app = flags.new_app(
    "Jobs that were given up: malformed, or on the device when consumer after consumer died. They are kept with their "
    "reason until somebody replays or drops them, or they grow too old."
)


def _lane_of(word: str) -> Lane:
    if word not in set(Lane):  # typer's own words for it begin with those of pydantic
        raise typer.BadParameter(f"{word!r} is none of {', '.join(Lane)}.")
    return Lane(word)


_Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a dead letter, as `list` shows it.", show_default=False)]
_Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of dead letters, as `list` shows them.")]
_All = Annotated[bool, typer.Option("--all", help="All of them; the filters below narrow it.")]
_Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Only those with this text in their reason.")]
_OlderThan = Annotated[
    float | None, typer.Option("--older-than-s", min=0, metavar="NUMBER", help="Only those given up so long ago.")
]
_Lane = Annotated[
    Lane | None, typer.Option(parser=_lane_of, metavar=f"<{'|'.join(Lane)}>", help="Only those of one lane.")
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def list_letters(
    settings: Settings,
    limit: Annotated[int, typer.Option(min=1, metavar="INTEGER", help="Most to show.")] = 50,
    reason: _Reason = None,
    older_than_s: _OlderThan = None,
    lane: _Lane = None,
    as_json: _Json = False,
) -> int:
    """Show dead letters, the newest first.

    A table on a terminal; elsewhere columns with tabs between them: id, time, lane, request id, job of the request,
    inputs, tokens, consumers that died with it, reason.
    """
    from . import dead_letter_commands as commands
    from .dead_letter_store import Filter

    return commands.show_list(settings, Filter(lane, reason, older_than_s), limit, as_json=as_json)


def show(
    settings: Settings,
    letter_id: _Id,
    texts: Annotated[bool, typer.Option("--texts", help="Show the texts too; they may be private.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> int:
    """Show all that one dead letter says, but not its texts."""
    from . import dead_letter_commands as commands

    return commands.show_one(settings, letter_id, texts=texts, as_json=as_json)


def replay(
    settings: Settings,
    ids: _Ids = None,
    everything: _All = False,
    reason: _Reason = None,
    older_than_s: _OlderThan = None,
    lane: _Lane = None,
    ttl_s: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_TTL_S,
            metavar="INTEGER",
            help="Seconds from now within which a consumer must begin with it.",
        ),
    ] = 3600,
    result_ttl_s: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_RESULT_TTL_S,
            metavar="INTEGER",
            help="Seconds to keep the result, to be picked up by its request id. "
            "Default: the setting of this name, EMBEDSTREAM_RESULT_TTL_S.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replay token ids of a revision that is no longer served, too.")
    ] = False,
) -> int:
    """Put jobs back on their lane. What killed consumers may do so again: mend the cause first."""
    from . import dead_letter_commands as commands
    from .dead_letter_store import Filter

    selection = commands.Selection(tuple(ids or ()), everything, Filter(lane, reason, older_than_s))
    times = commands.Times(ttl_s, result_ttl_s or settings.result_ttl_s)
    return commands.replay(settings, selection, times, force=force)


def drop(
    settings: Settings,
    ids: _Ids = None,
    everything: _All = False,
    reason: _Reason = None,
    older_than_s: _OlderThan = None,
    lane: _Lane = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --all.")] = False,
) -> int:
    """Delete dead letters for good."""
    from . import dead_letter_commands as commands
    from .dead_letter_store import Filter

    selection = commands.Selection(tuple(ids or ()), everything, Filter(lane, reason, older_than_s))
    return commands.drop(settings, selection, yes=yes)


for _name, _function in (("list", list_letters), ("show", show), ("replay", replay), ("drop", drop)):
    app.command(_name)(flags.command_of(Role.DEAD_LETTERS, _function))
