"""What every command that has children does with them: start a role, start again what dies, stop all in time."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from embedstream.consumer.cpu import thread_count
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Role, Settings, variable_of

from .children import Child, ending_of
from .embedded import EmbeddedServer
from .signals import Signals
from .spawn import spawn

Command = Callable[[Role, int | None], Sequence[str]]
"""Builds a child's command line from its role and the number of the inherited listening socket."""

_GRACE_S = 1.0
"""A child that uses its whole time to finish still gets this much to say goodbye."""

log = get_logger()


def role_command(role: Role, fd: int | None = None) -> list[str]:
    """The command line of a role; the settings travel in the environment, where other users cannot read the keys."""
    # -P: a file named like a library in the current folder must not be imported in its place.
    command = [sys.executable, "-P", "-m", "embedstream.deploy", role.value]
    return command if fd is None else [*command, "--fd", str(fd)]


def launch(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int, fd: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a role as a child that ends with us; call it from the main thread.

    Args:
        command: its command line.
        environment: its whole environment.
        output: where both its output streams go.
        fd: a socket it inherits, by the same number.
    """
    return spawn(
        command,
        env=environment,
        # Not SIGTERM: our Valkey is gone as well then, and a consumer could not hand in what it would finish.
        death_signal=signal.SIGKILL,
        output=output,
        pass_fds=[] if fd is None else [fd],
    )


def share_of_cores(settings: Settings) -> dict[str, str]:
    """Variables that share the cores among the consumers."""
    threads = str(thread_count(settings))
    return {variable_of("threads"): threads, "OMP_NUM_THREADS": threads}


def tell_end(child: Child, code: int) -> None:
    """Log that a child has ended, and whether it is started again."""
    if child.final:
        log.error("process.cannot_run", process=child.name, ending=ending_of(code), reason="see its own message above")
        return
    words = {} if child.last_words is None else {"last_words": child.last_words()}
    log.warning(
        "process.ended", process=child.name, ending=ending_of(code), restart_in_s=round(child.due_in_s), **words
    )


class OwnValkey:
    """The embedded Valkey as a child: started again on the same socket when it dies.

    Args:
        settings: its memory limit, and the folder that makes it durable.
    """

    def __init__(self, settings: Settings) -> None:
        self._server = EmbeddedServer(settings)
        self.child = Child("Valkey", self._server.spawn, last_words=self._server.log_tail)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return self._server.url

    @property
    def folder(self) -> Path:
        """Its private folder."""
        return self._server.folder

    def start(self, signals: Signals) -> None:
        """Start it and wait until it answers, or somebody asks us to stop.

        Raises:
            Unavailable: it did not start.
        """
        self.child.start()
        self._server.wait_until_ready(cancelled=lambda: signals.stopping)

    def remove(self) -> None:
        """Remove its private folder and give the data folder free, once the process is gone."""
        self._server.remove()


class Tending:
    """Looks after the children of one command.

    Args:
        signals: entered by the caller; a second wish to stop ends the patience.
        shutdown_timeout_s: time children have to finish after SIGTERM.
        ended: told of each child that has ended, and of its exit code.
    """

    def __init__(self, signals: Signals, shutdown_timeout_s: float, ended: Callable[[Child, int], None]) -> None:
        self._signals = signals
        self._shutdown_timeout_s = shutdown_timeout_s
        self._ended = ended

    def look_after(self, children: Sequence[Child]) -> float:
        """Start again what has died, when its time has come.

        Returns:
            Seconds until the next one is to be started; infinite where none is.
        """
        for child in children:
            code = child.reap()
            if code is not None:
                self._ended(child, code)
            if child.is_due:
                _start_again(child)
        return min((child.due_in_s for child in children), default=math.inf)

    def stop(self, children: Sequence[Child]) -> None:
        """Ask children to stop, wait until they have, and kill those that take too long."""
        for child in children:
            child.ask_to_stop()
        deadline = time.monotonic() + self._shutdown_timeout_s + _GRACE_S
        while not all(child.has_ended for child in children):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or self._signals.urgent:
                break
            self._signals.wait(left_s)
        for child in children:
            if child.kill():
                reason, tell = "it did not stop in time", log.warning
                if self._signals.urgent:
                    reason, tell = "asked to stop at once", log.info
                tell("process.killed", process=child.name, reason=reason)


def _start_again(child: Child) -> None:
    try:
        child.start()
    except OSError as error:  # no memory or no process left; later there may be
        child.postpone()
        log.error("process.not_started", process=child.name, error=str(error))
    else:
        log.info("process.restarted", process=child.name)
