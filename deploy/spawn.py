"""Child processes that never outlive us.

Each child leads a process group of its own: a terminal's Ctrl-C reaches the supervisor alone, which then stops the
children in order, and what a child started can be ended with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    death_signal: signal.Signals,
    output: IO[bytes] | int,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a child that gets a signal when this process dies, however it dies.

    Call it from the main thread: Linux sends the signal when the thread that started the child ends. Other systems
    have no such signal; there a SIGKILLed parent leaves its children to be ended by hand.

    Args:
        argv: program and arguments; no secrets, other users can read them.
        env: its whole environment.
        death_signal: sent by the kernel when this process is gone.
        output: where both its output streams go.
        pass_fds: open files it inherits, by the same numbers.
    """
    return subprocess.Popen(  # noqa: S603 - no shell; the arguments are ours
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        process_group=0,
        preexec_fn=_tied_to_us(death_signal) if sys.platform == "linux" else None,
    )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and everything it started that is still there, and reap the child."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody of the group is left; macOS says the latter of zombies
        process.kill()  # does nothing to a child that has ended
    process.wait()


def _tied_to_us(death_signal: signal.Signals) -> Callable[[], None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def tie() -> None:
        if death_signal is not signal.SIGKILL:
            # Until exec our Python handler would swallow the signal; the default action does not.
            signal.signal(death_signal, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return tie
