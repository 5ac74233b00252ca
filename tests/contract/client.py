"""A client that sends what it is told to, and what came back."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_REPLY_S = 60.0


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
        new = self._new()
        for connection in (*self._one_idle(), new):
            try:
                connection.request(method, path, content, sent)
                response = connection.getresponse()
                reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                connection.close()
                if connection is new:
                    raise
                continue  # the server had closed a connection that was idle, and may have closed others
            except BaseException:
                connection.close()
                raise
            if response.will_close:
                connection.close()
            else:
                self._idle.append(connection)
            return reply
        raise AssertionError("unreachable")

    def _one_idle(self) -> list[http.client.HTTPConnection]:
        try:
            return [self._idle.pop()]
        except IndexError:
            return []

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
