"""Consumers and one API process, started and ended together."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos.processes import Process
from tests.chaos.server import free_port

_START_S = 300.0
"""Where others compute too, what stands for another machine has hardly any of the processor."""


class Deployment:
    """Processes of one deployment; all are gone after the `with` block.

    Args:
        folder: for logs.
        settings: of all processes, by variable name without its prefix.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.port = free_port()
        self._folder = folder
        self._settings = {
            f"EMBEDSTREAM_{name}": str(value) for name, value in {"LOG_LEVEL": "warning", **settings}.items()
        }
        self._running: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.end()

    def start(
        self, name: str, module: str, *flags: str, variables: Mapping[str, str] | None = None, elsewhere: bool = False
    ) -> Process:
        """Start a module as a process.

        Args:
            name: of the process.
            module: to run.
            flags: its command line.
            variables: further ones of its environment.
            elsewhere: it stands for another machine, and leaves the processor to the API process.
        """
        argv = [*(["nice", "-n", "19"] if elsewhere else []), sys.executable, "-m", module, *flags]
        process = Process(name, argv, {**self._settings, **(variables or {})}, self._folder / f"{name}.log")
        self._running.append(process)
        return process

    def start_api(self, module: str = "embedstream.api", variables: Mapping[str, str] | None = None) -> Process:
        """Start the API process, and wait until it and a consumer serve."""
        process = self.start("api", module, "--port", str(self.port), variables=variables)
        deadline_s = time.monotonic() + _START_S
        while not self._is_healthy():
            if time.monotonic() > deadline_s or process.code is not None:
                raise RuntimeError("not ready\n" + "\n".join(each.log_tail() for each in self._running))
            time.sleep(0.1)
        return process

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False
