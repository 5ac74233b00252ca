"""Child processes: each with its log, ended by its id, and gone with us however we end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedstream.deploy.spawn import end_group, spawn
from embedstream.shared.flags import without_settings

_TAIL_BYTES = 3000


class Process:
    """A running child.

    Args:
        name: for people.
        argv: program and arguments.
        settings: EMBEDSTREAM_* variables; those of the person who runs this are not passed on.
        log: where its output is appended.
    """

    def __init__(self, name: str, argv: Sequence[str], settings: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("ab") as output:
            self._child = spawn(
                argv, env={**without_settings(os.environ), **settings}, death_signal=signal.SIGKILL, output=output
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._child.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.code is None:
            self._child.send_signal(number)

    def end(self) -> None:
        """SIGKILL it and what it started, and wait."""
        end_group(self._child)

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        return self._child.wait(timeout_s)

    def log_lines(self) -> list[bytes]:
        """All it has written, by whole lines."""
        return self._log.read_bytes().split(b"\n")[:-1]

    def log_tail(self) -> str:
        """The last lines it wrote."""
        if not self._log.exists():
            return ""
        return f"--- {self.name} at {time.strftime('%X')}\n" + self._log.read_bytes()[-_TAIL_BYTES:].decode(
            errors="replace"
        )
