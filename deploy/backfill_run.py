"""`embedstream backfill` at work.

The backfill itself runs on an event loop in a thread of its own. The main thread waits for signals, looks after the
children, which Linux ties to the thread that started them, and shows how far it is.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import closing
from dataclasses import replace

from embedstream.producer.backfill.backfill import Outcome, finished_already
from embedstream.producer.backfill.options import BackfillOptions
from embedstream.producer.backfill.outputs import output_of
from embedstream.producer.backfill.progress import Progress
from embedstream.shared import exits, logs, runfile
from embedstream.shared.errors import EmbedstreamError, Unavailable
from embedstream.shared.processes import Identity
from embedstream.shared.settings import LogLevel, Role, Settings, flag_of, roles_of
from embedstream.shared.urls import without_secrets

from .backfill_events import Events
from .backfill_unheard import Unheard, open_missing
from .backfill_view import Bar, Lines, View
from .backfill_work import Work
from .own_fleet import OwnFleet
from .signals import Signals
from .tending import Command, role_command

_LOOK_S = 0.2


def run(settings: Settings, options: BackfillOptions, *, as_json: bool = False, command: Command = role_command) -> int:
    """Run a backfill, or go on with one, and return the exit code.

    Args:
        settings: without a URL of Redis it joins the running server, or brings a fleet of its own.
        options: what is asked for.
        as_json: tell programs instead of people.
        command: builds the command lines of consumers of its own.

    Raises:
        EmbedstreamError: as `backfill` does, and as `OwnFleet` does.
    """
    open_missing()
    # No more than what went wrong, among the lines that say how far it is.
    logs.configure(settings.model_copy(update={"log_level": LogLevel.WARNING}), Role.BACKFILL)
    options = replace(options, vectors=replace(options.vectors, partial=True))
    own = settings.redis_url is None and not runfile.find_live()
    progress = Progress()
    loading = f"loading {settings.served_names[0]}" if own else ""
    with Signals() as signals, closing(Unheard(_view(progress, options, loading, as_json=as_json))) as view:
        one = _Run(signals, view, progress)
        try:
            if own:
                if found := _finished_already(options, settings):
                    return one.ended(found)
                return one.with_fleet(OwnFleet(settings, signals, command), options)
            _tell_unused(settings)
            return one.alone(runfile.connected(settings), options)
        except EmbedstreamError as error:
            view.failed(error, exits.code_of(error))
            raise


class _Run:
    """One backfill as the main thread sees it."""

    def __init__(self, signals: Signals, view: View, progress: Progress) -> None:
        self._signals = signals
        self._view = view
        self._progress = progress
        self._stops = 0

    def with_fleet(self, fleet: OwnFleet, options: BackfillOptions) -> int:
        """Bring a fleet for as long as it takes."""
        try:
            fleet.start()
            return self.alone(fleet.settings, options, fleet)
        finally:
            fleet.stop()

    def alone(self, settings: Settings, options: BackfillOptions, fleet: OwnFleet | None = None) -> int:
        """Do the work; the exit code."""
        joined = None if fleet is not None else runfile.owner_of(settings.redis_url or "")
        return self.ended(self._watched(Work(settings, options, self._progress), fleet, joined))

    def ended(self, outcome: Outcome | None) -> int:
        """Say how it ended; the exit code.

        Args:
            outcome: None when it was cancelled.
        """
        if outcome is not None and outcome.complete:
            self._view.finished(outcome)
            return os.EX_DATAERR if outcome.bad_rows else exits.OK
        self._view.interrupted()
        return exits.interrupted_by(self._signals.first_stop or signal.SIGINT)

    def _watched(self, work: Work, fleet: OwnFleet | None, joined: Identity | None) -> Outcome | None:
        work.start()
        try:
            while not work.done:
                longest_s = _LOOK_S
                if fleet is not None:
                    longest_s = min(longest_s, fleet.look_after())
                    if self._progress.model:
                        fleet.serving()
                if joined is not None and not joined.is_alive and not work.done:
                    raise Unavailable(
                        "The server that it had joined has ended, and its queue with it. The same command goes on: "
                        "beside another server, or without any, on its own."
                    )
                self._signals.wait(longest_s)
                self._stop_if_asked(work)
                self._view.show()
        except BaseException:
            work.cancel()
            work.wait()
            raise
        return work.outcome()

    def _stop_if_asked(self, work: Work) -> None:
        if self._signals.stops == self._stops:
            return
        self._stops = self._signals.stops
        if self._signals.urgent or not self._progress.running:  # no part is under way yet
            work.cancel()
        else:
            work.stop()
            self._view.stopping()


def _view(progress: Progress, options: BackfillOptions, loading: str, *, as_json: bool) -> View:
    output = output_of(options.output).shown
    if as_json:
        return Events(progress, without_secrets(options.input.path), output)
    return Bar(progress, output, loading) if sys.stderr.isatty() else Lines(progress, output, loading)


def _finished_already(options: BackfillOptions, settings: Settings) -> Outcome | None:
    """All that is asked for, if it is done: then no model need be loaded to say so."""
    state = options.state or output_of(options.output).state_folder
    return finished_already(options, settings.served_names) if state.exists() else None


def _tell_unused(settings: Settings) -> None:
    """Flags of consumers say nothing to those that are there already: better told than found in the vectors."""
    own = [
        name
        for name in Settings.model_fields
        if name in settings.model_fields_set
        and {Role.BACKFILL, Role.DOCTOR} <= set(roles_of(name))
        and Role.EMBED not in roles_of(name)
    ]
    if own:
        flags = ", ".join(flag_of(name) for name in own)
        exits.complain(f"{flags} not used: the backfill joins consumers that are there already")
