"""Real servers for real clients, started from the project's own environment, `.venv`: HTTP is all that is shared."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest
from tests.clients.servers import KEY, Server

PROGRAM = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "embedstream"
START_S = 120


class Deployment:
    """Processes of ours on one Valkey; they live until the end of the tests.

    Args:
        environment: of all of them.
        folders: makes a folder for each log.
    """

    def __init__(self, environment: dict[str, str], folders: pytest.TempPathFactory) -> None:
        self._environment = environment
        self._folders = folders
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        options = ("--api-key", KEY, "--dtype", "float32", "--matryoshka-dims", "any", "--log-level", "warning")
        ready = self._start("serve", "--port", "0", *options, until=r" on (http://\S+)\n.*\n *queue: (unix://\S+)")
        self.server, self._queue = Server(ready[1]), ready[2]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def api(self, *options: str) -> Server:
        """Another API, with settings of its own."""
        options = ("--redis-url", self._queue, "--port", "0", "--api-key", KEY, *options)
        return Server(self._start("api", *options, until=r"api\.listening .*url=(\S+)\n")[1])

    def consumer(self, *options: str) -> None:
        """Another consumer, of another queue."""
        self._start("consumer", "--redis-url", self._queue, "--dtype", "float32", *options, until=r"worker\.ready")

    def _start(self, *arguments: str, until: str) -> re.Match[str]:
        log = self._folders.mktemp(arguments[0]) / "log"
        return self._stack.enter_context(_running(arguments, self._environment, log, until))


@contextmanager
def _running(arguments: Sequence[str], environment: dict[str, str], log: Path, until: str) -> Iterator[re.Match[str]]:
    with (
        log.open("w") as stream,
        subprocess.Popen([PROGRAM, *arguments], stdout=stream, stderr=stream, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + START_S
            while not (ready := re.search(until, log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield ready
        finally:
            process.terminate()
            process.wait(60)
