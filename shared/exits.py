"""How a command ends: exit codes after sysexits.h, and one line on stderr for an error we know.

| code | meaning |
| --- | --- |
| 0 | done, or stopped as asked |
| 1 | `doctor` found a fault: the model can be served, but a check failed |
| 2 | a flag or an environment variable has a wrong name or value |
| 65 | the input cannot be embedded as it stands; `backfill`: complete, but for bad rows, which the side file tells |
| 69 | something needed is not there: no running server, no consumer, a port or data folder in use, no Valkey |
| 70 | anything else went wrong, such as a job that was given up |
| 75 | the queue is full, or the result did not come in time; try again |
| 78 | the configuration cannot work: no such model, a package missing, an input changed; restarting is no help |
| 130, 143 | stopped by Ctrl-C or SIGTERM before the end; `backfill`: the same command goes on |
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from .errors import (
    EmbedstreamError,
    InvalidInput,
    Misconfigured,
    ModelLoadError,
    Overloaded,
    ResultTimeout,
    ServerNotFound,
    Unavailable,
)

OK = os.EX_OK
FOUND_FAULTS = 1
USAGE = 2
"""What typer ends with on a wrong flag; ours do the same."""
UNAVAILABLE = os.EX_UNAVAILABLE
FINAL = os.EX_CONFIG
"""A supervisor does not restart a process that ended with this."""


def complain(message: str) -> None:
    """Tell the user on stderr why the command ends."""
    sys.stderr.write(f"embedstream: {message}\n")


def code_of(error: EmbedstreamError) -> int:
    """The exit code for an error."""
    match error:
        case Unavailable() | ServerNotFound():
            return os.EX_UNAVAILABLE
        case Misconfigured() | ModelLoadError():
            return FINAL
        case InvalidInput():
            return os.EX_DATAERR
        case ResultTimeout() | Overloaded():
            return os.EX_TEMPFAIL
        case _:
            return os.EX_SOFTWARE


def interrupted_by(number: signal.Signals) -> int:
    """The exit code after a signal that ended the work, as shells give it."""
    return 128 + number


def run(command: Callable[[], int]) -> int:
    """Run a command; an error we know becomes one line and an exit code."""
    try:
        return command()
    except EmbedstreamError as error:
        complain(str(error))
        return code_of(error)
    except PermissionError as error:  # a folder or port that is not ours to use; the message names it
        complain(str(error))
        return os.EX_UNAVAILABLE
