"""Which backfills there are: what their state folders say, and what running processes say, here and in Redis."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import typer
from redis.exceptions import RedisError

from embedstream.producer.backfill import registry
from embedstream.producer.backfill.beats import Beat, beats_at, beats_in
from embedstream.producer.backfill.drafts import host_name
from embedstream.shared import exits, runfile
from embedstream.shared.connections import connect_sync
from embedstream.shared.errors import EmbedstreamError
from embedstream.shared.settings import Settings
from embedstream.shared.urls import without_password

from . import jobs_view as view

if TYPE_CHECKING:
    from embedstream.producer.backfill.survey import Survey


@dataclass(frozen=True, slots=True)
class Backfill:
    """One backfill.

    Args:
        id: its own.
        out: where it writes, without a password.
        beats: of the processes that work on it now.
        survey: what its state folder says; None where that is on another machine.
    """

    id: str
    out: str
    beats: tuple[Beat, ...]
    survey: Survey | None

    @property
    def state(self) -> str:
        """`running`, `stopped` or `complete`."""
        if self.survey and self.survey.is_complete:  # though a process may be there that has not seen it yet
            return "complete"
        return "running" if self.beats else "stopped"

    @property
    def taken(self) -> int:
        """Rows of the input in committed parts."""
        return max([*(beat.taken for beat in self.beats), self.survey.taken if self.survey else 0])

    @property
    def total(self) -> int | None:
        """Rows of the input, where that is known."""
        told = [beat.total for beat in self.beats if beat.total is not None]
        return self.survey.total if self.survey and self.survey.total is not None else max(told, default=None)

    @property
    def bad_rows(self) -> int:
        """Rows that were left out because they could not be embedded."""
        return max([*(beat.bad_rows for beat in self.beats), self.survey.bad_rows if self.survey else 0])

    @property
    def rows_per_s(self) -> float:
        """Of all its processes; 0 where none runs."""
        return sum(beat.rows_per_s for beat in self.beats)

    @property
    def left_s(self) -> float | None:
        """Time until it is done, as it goes now; None where nobody knows."""
        if self.total is None or self.rows_per_s <= 0:
            return None
        return max(0, self.total - self.taken) / self.rows_per_s

    @property
    def began(self) -> str | None:
        """ISO 8601, UTC; None where its state folder is on another machine."""
        return self.survey.manifest.began if self.survey else None

    @property
    def command(self) -> tuple[str, ...]:
        """What it was begun with, typed in `folder`; empty where nobody knows."""
        return self.survey.manifest.command if self.survey else ()

    @property
    def folder(self) -> str | None:
        """Where `command` was typed."""
        return self.survey.manifest.folder if self.survey else None


def show(settings: Settings, *, as_json: bool) -> int:
    """Print all backfills, those that run first, then the newest."""
    found = ordered(backfills(_surveys(), _heard(settings)))
    if as_json:
        for one in found:
            typer.echo(orjson.dumps(view.summary(one)))
    elif sys.stdout.isatty() and found:
        view.print_table(found)
    else:
        for one in found:
            typer.echo(view.columns(one))
    if _is_blind() and (n_folders := len(registry.remembered())):  # begun with another installation
        exits.complain(
            f"pyarrow is not installed to look into {n_folders} of this machine's backfills; "
            "`pip install '.[bulk]'` in embedstream's folder"
        )
    elif not found:
        typer.echo("No backfill is known on this machine, and none runs on the queue.", err=True)
    return exits.OK


def backfills(surveys: Iterable[tuple[Survey, Mapping[str, Beat]]], heard: Mapping[str, Beat]) -> list[Backfill]:
    """All backfills, each once.

    Args:
        surveys: of the state folders here, with the processes that say there that they run.
        heard: processes that say so in Redis.
    """
    told: dict[str, tuple[Survey | None, Mapping[str, Beat]]] = {
        survey.manifest.id: (survey, beats) for survey, beats in surveys
    }
    ids = dict.fromkeys([*told, *(beat.id for beat in heard.values())])
    return [_one(id_, told.get(id_, (None, {})), heard) for id_ in ids]


def ordered(found: Iterable[Backfill]) -> list[Backfill]:
    """Those that run first, then the newest."""
    newest_first = sorted(found, key=lambda one: one.began or "", reverse=True)
    return sorted(newest_first, key=lambda one: one.state != "running")


def _one(id_: str, told: tuple[Survey | None, Mapping[str, Beat]], heard: Mapping[str, Beat]) -> Backfill:
    survey, beats = told
    mine = {mark: beat for mark, beat in heard.items() if beat.id == id_}
    if survey is not None:  # the folder knows of a death on this machine at once, Redis some seconds later
        mine = {mark: beat for mark, beat in mine.items() if beat.host != host_name()}
    processes = mine | dict(beats)
    out = survey.manifest.output.path if survey else next(beat.out for beat in processes.values())
    return Backfill(id_, out, tuple(processes.values()), survey)


def _is_blind() -> bool:
    """Whether state folders cannot be read here: without the extra `bulk`."""
    return find_spec("pyarrow") is None


def _surveys() -> Iterator[tuple[Survey, Mapping[str, Beat]]]:
    """Of the state folders of this user; what cannot be read is told on stderr."""
    if _is_blind():
        return
    from embedstream.producer.backfill.survey import survey

    for folder in registry.remembered():
        try:
            found = survey(folder)
        except EmbedstreamError as error:
            exits.complain(str(error))
            continue
        if found is not None:
            yield found, beats_in(Path(folder) / "running")


def _heard(settings: Settings) -> dict[str, Beat]:
    """Of the Redis that is named, else of all servers that run here; one that does not answer is told on stderr."""
    where = [(settings.redis_url, settings.key_prefix)] if settings.redis_url else _servers()
    found: dict[str, Beat] = {}
    for url, prefix in where:
        try:
            with closing(connect_sync(url)) as redis:
                found |= beats_at(redis, prefix)
        except (RedisError, OSError) as error:
            reason = type(error).__name__
            exits.complain(f"Redis at {without_password(url)} does not answer ({reason}): what runs there is not shown")
    return found


def _servers() -> list[tuple[str, str]]:
    return [(run.redis_url, run.key_prefix) for run in runfile.find_live()]
