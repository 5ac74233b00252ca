"""Metrics of several processes in the files of one folder.

`serve` gives its children a folder, and each child a name. A child that is started again goes on in the files of the
one before it, so counters never fall and the folder never grows: four small files (counters, histograms, two kinds of
gauges) for each child, however often it died. Without a name the library takes the pid, and files of dead pids stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import Metric, multiprocess, values
from prometheus_client.registry import Collector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The library's own: it must be set before the library is imported, and the folder must exist."""
PROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_PROCESS"
"""Ours: the name of this process in its files' names. No two processes may have the same at a time, nor `_` in it."""


def shared_folder() -> Path | None:
    """The folder this process shares with others; None when it keeps its numbers to itself."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def take_name() -> None:
    """Write under the given name from now on; call it before the first metric is made."""
    name = os.environ.pop(PROCESS_VARIABLE, None)  # taken away: what this process starts is another process
    if name is None or shared_folder() is None:
        return
    pid = os.getpid()

    def identify() -> str:
        return name if os.getpid() == pid else f"{name}-{os.getpid()}"  # a fork must not write into our files

    values.ValueClass = values.MultiProcessValue(identify)  # type: ignore[no-untyped-call]  # of the library


def forget(folder: Path, name: str) -> None:
    """Remove what was true only while a process lived: its live gauges. Its counters stay."""
    multiprocess.mark_process_dead(name, str(folder))  # type: ignore[no-untyped-call]  # of the library


class AllProcesses(Collector):
    """The sum of all processes that write to a folder.

    Args:
        folder: of their files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Read all files. It blocks, for about a third of a millisecond a file."""
        # A process that just starts has an empty file for a moment, which the library does not expect.
        files = [str(path) for path in self._folder.glob("*.db") if _size_of(path)]
        merged: Iterable[Metric] = multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]  # of the library
        return merged


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # the live gauges of a process that has just died
        return 0
