"""Running servers of the contract: one API process for each set of flags, started when a case first asks for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from embedstream.shared.flags import without_settings

from .client import Api

ROOT = Path(__file__).resolve().parents[2]
START_S = 400.0
"""A dozen processes start at once, and one of them loads all models."""

KEY, OTHER_KEY, FILE_KEY, SMALL_KEY, BULK_KEY = "alpha-key", "beta-key", "file-key", "small-key", "bulk-key"
ORIGIN = "https://app.example"
_KEYS = f"""
[keys.file]
key = "{FILE_KEY}"
[keys.small]
key = "{SMALL_KEY}"
tokens_per_s = 0.001
burst_tokens = 4
[keys.bulk]
key = "{BULK_KEY}"
lane = "bulk"
"""


@dataclass(frozen=True)
class Kind:
    """A way to start the API.

    Args:
        prefix: of its Redis keys: which consumer it talks to, if any.
        flags: of the command line.
        ready: the path that answers 200 once it can be used.
    """

    prefix: str
    flags: tuple[str, ...] = ()
    ready: str = "/health"


KINDS = {
    "tiny": Kind("tiny"),
    "raw": Kind("raw"),
    "any": Kind("any"),
    "all": Kind("all"),
    "prompted": Kind("prompted"),
    "headed": Kind("headed", ("--long-inputs", "chunk")),
    "tasked": Kind("tasked"),
    "truncating": Kind("tiny", ("--long-inputs", "truncate")),
    "auto": Kind("any", ("--auto-truncate", "--trust-request-chat-template")),
    "chunking": Kind("tiny", ("--long-inputs", "chunk", "--max-request-tokens", "500")),
    "keyed": Kind(
        "tiny",
        (
            *("--api-key", KEY, "--api-key", OTHER_KEY, "--cors-allow-origin", ORIGIN),
            *("--api-keys-file", "keys.toml"),
        ),
    ),
    "open-metrics": Kind("tiny", ("--api-key", KEY, "--metrics-open")),
    "limited": Kind(
        "tiny",
        (
            *("--max-request-inputs", "4", "--max-request-tokens", "40", "--payload-limit", "2048"),
            *("--metadata-limit-bytes", "1024", "--max-lane-bytes", "1"),
        ),
    ),
    "impatient": Kind("tiny", ("--header-timeout-s", "0.5", "--read-timeout-s", "0.5", "--request-timeout-s", "0.2")),
    "deserted": Kind("deserted", ready="/livez"),
    "no-redis": Kind("tiny", ("--redis-url", "unix:///nowhere/redis.sock"), ready="/livez"),
}


class Servers:
    """Starts what is asked for, and ends it all.

    Args:
        redis_url: of the queue.
        folder: for models and logs.
        tokenizer_json: of the tiny models.
    """

    def __init__(self, redis_url: str, folder: Path, tokenizer_json: str) -> None:
        self.redis_url = redis_url
        self.folder = folder
        (folder / "tokenizer.json").write_text(tokenizer_json)
        (folder / "keys.toml").write_text(_KEYS)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._apis: dict[str, Api] = {}
        self._ready: set[str] = set()

    def __getitem__(self, name: str) -> Api:
        """The server of a kind, ready."""
        self.start([name])
        if name not in self._ready:
            self._wait(name)
            self._ready.add(name)
        return self._apis[name]

    def start(self, names: Iterable[str]) -> None:
        """Start servers of these kinds, as far as they do not run; they need not be ready."""
        if not self._processes:
            argv = ["-m", "tests.contract.consumers", "--redis-url", self.redis_url, "--folder", str(self.folder)]
            self._spawn("consumers", argv)
        for name in names:
            if name not in self._apis:
                self._start_api(name, KINDS[name])

    def stop(self) -> None:
        """End all processes."""
        for api in self._apis.values():
            api.close()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _spawn(self, name: str, argv: list[str], fd: int | None = None) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT if fd is None else self.folder,  # where `tests` is found, and where the keys file lies
                env=without_settings(os.environ),
                stdout=log,
                stderr=log,
                pass_fds=() if fd is None else (fd,),
            )

    def _start_api(self, name: str, kind: Kind) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            argv = ["-m", "embedstream.api", "--fd", str(listener.fileno()), "--key-prefix", kind.prefix]
            argv += ["--redis-url", self.redis_url] if "--redis-url" not in kind.flags else []
            self._spawn(name, [*argv, "--log-level", "warning", *kind.flags], listener.fileno())
            self._apis[name] = Api(listener.getsockname()[1])

    def _wait(self, name: str) -> None:
        deadline_s = time.monotonic() + START_S
        while True:
            for each in (name, "consumers"):
                assert self._processes[each].poll() is None, self._log(each)
            assert time.monotonic() < deadline_s, self._log(name) + self._log("consumers")
            try:
                if self._apis[name].ask("GET", KINDS[name].ready).status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()
