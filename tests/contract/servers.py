"""Running servers of the contract: one API process for each set of flags, started when a case first asks for it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from embedstream.shared.flags import without_settings

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
_REPLY_S = 60.0

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
    "truncating": Kind("tiny", ("--long-inputs", "truncate")),
    "auto": Kind("tiny", ("--auto-truncate",)),
    "chunking": Kind("tiny", ("--long-inputs", "chunk", "--max-request-tokens", "500")),
    "raw-chunking": Kind("raw", ("--long-inputs", "chunk")),
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
            *("--metadata-limit-bytes", "1024"),
        ),
    ),
    "impatient": Kind("tiny", ("--header-timeout-s", "0.5", "--read-timeout-s", "0.5")),
    "hasty": Kind("tiny", ("--request-timeout-s", "0.2")),
    "narrow": Kind("tiny", ("--max-lane-bytes", "1")),
    "trusting": Kind("any", ("--trust-request-chat-template",)),
    "deserted": Kind("deserted", ready="/livez"),
    "no-redis": Kind("tiny", ("--redis-url", "unix:///nowhere/redis.sock"), ready="/livez"),
}


@dataclass(frozen=True)
class Reply:
    """What came back. `headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @cached_property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What the body says under `error`."""
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def tokens(self) -> int:
        """Prompt tokens of the usage."""
        return int(self.json["usage"]["prompt_tokens"])

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Of the forms `float` and `base64` (in little-endian float32)."""
        items = [item["embedding"] for item in self.json["data"]]
        rows = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in items]
        return np.array(rows, np.float32)


NUMPY: dict[str, Any] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def unpacked(data: bytes, dtype: str = "float32", endianness: str = "native") -> NDArray[Any]:
    """Packed components as numbers of their own type."""
    plain = np.frombuffer(data, np.dtype(f"{'>' if endianness == 'big' else '<'}u{NUMPY[dtype].itemsize}"))
    return plain.astype(plain.dtype.newbyteorder("<")).view(NUMPY[dtype])


class Api:
    """A running API process, and connections to it that are kept.

    Args:
        port: where it listens on the loopback address.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[http.client.HTTPConnection] = []
        self._known: dict[str, NDArray[np.float32]] = {}

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, raw: bool = False
    ) -> Reply:
        """Send a request.

        Args:
            method: of HTTP.
            path: with its query.
            body: bytes as they are, or a value to be sent as JSON; None for no body.
            headers: sent along; a body has the content type of JSON unless these say something else.
            raw: the headers are all that is sent.
        """
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {} if raw or body is None else {"content-type": "application/json"}
        sent |= {name.lower(): value for name, value in (headers or {}).items()}
        for last in (False, True):
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else self._new()
            try:
                connection.request(method, path, content, sent)
                response = connection.getresponse()
                reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                connection.close()
                if last or not kept:
                    raise
                continue  # the server had closed a connection that was idle
            except BaseException:
                connection.close()
                raise
            if response.will_close:
                connection.close()
            else:
                self._idle.append(connection)
            return reply
        raise AssertionError("unreachable")

    def _new(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_REPLY_S)

    def close(self) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().close()

    def post(self, body: Any, path: str = "/v1/embeddings", **headers: str) -> Reply:
        """POST, and it must succeed."""
        reply = self.ask("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        assert reply.status == 200, reply.body
        return reply

    def vectors(self, inputs: Any, **options: Any) -> NDArray[np.float32]:
        """Reference vectors, asked for once."""
        key = json.dumps([inputs, options])
        if key not in self._known:
            self._known[key] = self.post({"input": inputs, "encoding_format": "base64", **options}).vectors
        return self._known[key]


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
        self._processes: list[subprocess.Popen[bytes]] = []
        self._apis: dict[str, Api] = {}
        self._consumers: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Api:
        """The server of a kind, ready."""
        if name not in self._apis:
            if self._consumers is None:
                argv = ["-m", "tests.contract.consumers", "--redis-url", self.redis_url, "--folder", str(self.folder)]
                self._consumers = self._start("consumers", argv)
            self._apis[name] = self._start_api(name, KINDS[name])
        return self._apis[name]

    def stop(self) -> None:
        """End all processes."""
        for api in self._apis.values():
            api.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _start(self, name: str, argv: list[str], fd: int | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT if fd is None else self.folder,  # where `tests` is found, and where the keys file lies
                env=without_settings(os.environ),
                stdout=log,
                stderr=log,
                pass_fds=() if fd is None else (fd,),
            )
        self._processes.append(process)
        return process

    def _start_api(self, name: str, kind: Kind) -> Api:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            argv = ["-m", "embedstream.api", "--fd", str(listener.fileno()), "--key-prefix", kind.prefix]
            argv += ["--redis-url", self.redis_url] if "--redis-url" not in kind.flags else []
            process = self._start(name, [*argv, "--log-level", "warning", *kind.flags], listener.fileno())
            api = Api(listener.getsockname()[1])
        deadline_s = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline_s, (self.folder / f"{name}.log").read_text()
            try:
                if api.ask("GET", kind.ready).status == 200:
                    return api
            except OSError:
                pass
            time.sleep(0.05)
