"""Processes by pid and start time: a pid alone is given to another program sooner or later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from calendar import timegm
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, never mistaken for a later one with the same pid.

    Args:
        pid: its number.
        started: Linux: clock ticks since boot; elsewhere seconds since 1970.
    """

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        return _started(self.pid) == self.started


def identity_of(pid: int) -> Identity | None:
    """The identity of a running process, or None."""
    started = _started(pid)
    return None if started is None else Identity(pid, started)


def own_identity() -> Identity:
    """The identity of this process."""
    identity = identity_of(os.getpid())
    if identity is None:
        raise RuntimeError("the start time of this process cannot be read; is /proc mounted?")
    return identity


def _started(pid: int) -> int | None:
    return _started_linux(pid) if sys.platform == "linux" else _started_ps(pid)


def _started_linux(pid: int) -> int | None:
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in brackets and may itself hold blanks and brackets (proc(5)).
    state, *rest = line[line.rindex(")") + 1 :].split()
    return None if state in {"Z", "X"} else int(rest[18])


def _started_ps(pid: int) -> int | None:
    answer = subprocess.run(  # noqa: S603 - fixed program, numeric argument
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "TZ": "UTC"},
    )
    state, _, moment = answer.stdout.strip().partition(" ")
    if not moment or state.startswith("Z"):
        return None
    return timegm(time.strptime(moment.strip(), "%a %b %d %H:%M:%S %Y"))
