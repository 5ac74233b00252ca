"""What `embedstream dead-letters` does: list, show, replay, drop."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice

import orjson
import typer
from redis.exceptions import RedisError

from embedstream.shared import exits, jobs, runfile
from embedstream.shared.connections import connect_sync
from embedstream.shared.errors import MalformedJob, Unavailable
from embedstream.shared.jobs import NO_FINGERPRINT, Job
from embedstream.shared.settings import Settings
from embedstream.shared.urls import without_password

from . import dead_letter_view as view
from .dead_letter_store import DeadLetter, DeadLetterStore, Filter, open_store

FAILED = os.EX_SOFTWARE
"""Exit code when a dead letter was not found, or could not be replayed."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters a command is for: some ids, or all that a filter takes."""

    ids: tuple[str, ...]
    everything: bool
    filter: Filter

    @property
    def objection(self) -> str | None:
        """Why it cannot be what the user means, or None."""
        if self.everything == bool(self.ids):
            return "name the dead letters by their ids, or all of them with --all"
        if self.ids and not self.filter.is_open:
            return "--reason, --older-than-s and --lane go with --all; the ids alone say which"
        return next(filter(None, map(_id_objection, self.ids)), None)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that a replayed job may wait for a consumer, and that its result is kept."""

    ttl_s: int
    result_ttl_s: int


def show_list(settings: Settings, wanted: Filter, limit: int, *, as_json: bool) -> int:
    """Print the newest dead letters, and on stderr how many more there are."""
    with _opened(settings) as store:
        found = store.scan(wanted, newest_first=True)
        shown = list(islice(found, limit))
        more = store.count() - len(shown) if wanted.is_open else sum(1 for _ in found)
    if as_json:
        for letter in shown:
            typer.echo(orjson.dumps(view.summary(letter)))
    elif sys.stdout.isatty() and shown:
        view.print_table(shown)
    else:
        for letter in shown:
            typer.echo(view.columns(letter))
    if not shown:
        _note(f"No dead letters of `{store.model}`{'' if wanted.is_open else ' that meet the filters'}.")
    elif more > 0:
        _note(f"{more:,} more, older ones; --limit {len(shown) + more} shows all.")
    return exits.OK


def show_one(settings: Settings, letter_id: str, *, texts: bool, as_json: bool) -> int:
    """Print all of one dead letter."""
    if objection := _id_objection(letter_id):
        exits.complain(objection)
        return exits.USAGE
    with _opened(settings) as store:
        found = store.get(letter_id)
    if found is None:
        return _complain_missing(store, letter_id)
    said = view.details(*found, texts=texts)
    if as_json:
        typer.echo(orjson.dumps(said))
    else:
        for line in view.lines(said):
            typer.echo(line)
    if texts and "texts" not in said:
        _note("It holds no texts that can be shown.")
    return exits.OK


def replay(settings: Settings, selection: Selection, times: Times, *, force: bool) -> int:
    """Put dead letters back on their lanes, the oldest first, and print the request id of each."""
    if selection.objection:
        exits.complain(selection.objection)
        return exits.USAGE
    with _opened(settings) as store:
        served = store.served()
        ids = _ids(store, selection)
        outcomes = [_replay_one(store, letter_id, times, None if force else served) for letter_id in ids]
    if len(ids) != 1:
        _note(f"{sum(outcomes):,} of {len(ids):,} replayed.")
    return exits.OK if all(outcomes) else FAILED


def drop(settings: Settings, selection: Selection, *, yes: bool) -> int:
    """Delete dead letters; all at once only when somebody confirms it."""
    if selection.objection:
        exits.complain(selection.objection)
        return exits.USAGE
    with _opened(settings) as store:
        ids = _ids(store, selection)
        if selection.everything and ids and not yes:
            if not sys.stdin.isatty():
                exits.complain(f"this would drop {len(ids):,} dead letters of `{store.model}`; confirm it with --yes")
                return exits.USAGE
            if not typer.confirm(f"Drop {len(ids):,} dead letters of `{store.model}` for good?", err=True):
                return exits.OK
        if selection.everything:
            missing, n_dropped = [], store.drop(ids)
        else:
            missing = [letter_id for letter_id in ids if not store.drop([letter_id])]
            n_dropped = len(ids) - len(missing)
        _note(f"{n_dropped:,} dropped.")
    for letter_id in missing:
        _complain_missing(store, letter_id)
    return FAILED if missing else exits.OK


def _replay_one(store: DeadLetterStore, letter_id: str, times: Times, served: frozenset[bytes] | None) -> bool:
    """Replay one, if it can be; `served` None skips the look at its fingerprint."""
    found = store.get(letter_id)
    if found is None:
        _complain_missing(store, letter_id)
        return False
    letter, body = found
    try:
        job = jobs.decode(letter.header, body)
    except MalformedJob as error:
        exits.complain(f"{letter_id} is no job and cannot be replayed: {view.printable(str(error))}")
        return False
    if served is not None and not _is_served(letter, job, served):
        return False
    done = store.replay(letter, job, ttl_s=times.ttl_s, result_ttl_s=times.result_ttl_s)
    if done is None:
        _complain_missing(store, letter_id)
        return False
    typer.echo(
        f"{letter_id} is on the {done.lane} lane again as {done.entry_id}: request {job.request_id.hex()}, "
        f"job {view.place(letter)}; the result will be kept for {times.result_ttl_s} s in {done.result_key}"
    )
    return True


def _is_served(letter: DeadLetter, job: Job, served: frozenset[bytes]) -> bool:
    """Whether some consumer can compute the job; what it would answer otherwise is told."""
    if job.fingerprint == NO_FINGERPRINT or job.fingerprint in served:
        return True
    what = f"{letter.id} was made for the revision {job.fingerprint.hex()}, which is not served"
    if job.texts is not None:
        _note(f"{what}; its texts are embedded with the present one.")
        return True
    exits.complain(f"{what} now: its token ids would be answered as stale. --force replays it nevertheless")
    return False


def _ids(store: DeadLetterStore, selection: Selection) -> list[str]:
    """The ids that are meant, each once; of all of them nothing more than the id is held."""
    if selection.everything:
        return [letter.id for letter in store.scan(selection.filter)]
    return list(dict.fromkeys(selection.ids))


def _id_objection(letter_id: str) -> str | None:
    if re.fullmatch(r"\d{1,20}-\d{1,20}", letter_id):
        return None
    return f"{letter_id!r} is no id; `embedstream dead-letters list` shows them, such as 1700000000000-0"


def _complain_missing(store: DeadLetterStore, letter_id: str) -> int:
    exits.complain(f"there is no dead letter {letter_id} of `{store.model}`")
    return FAILED


def _note(message: str) -> None:
    """For people, on stderr: stdout carries the data alone."""
    typer.echo(message, err=True)


@contextmanager
def _opened(settings: Settings) -> Iterator[DeadLetterStore]:
    """The dead letters that the settings name; what Redis says against it becomes one line."""
    connected = runfile.connected(settings)
    url = connected.redis_url or ""
    try:
        with closing(connect_sync(url)) as redis:
            yield open_store(redis, connected.key_prefix, connected.chosen_model)
    except RedisError as error:
        raise Unavailable(f"Redis at {without_password(url)} did not do it: {error}") from error
