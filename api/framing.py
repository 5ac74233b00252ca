"""Where one request ends and the next begins: what another server might read differently is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import httptools

from embedstream.shared.errors import Unavailable

from .errors import HttpError, MalformedRequest

_VERSIONS = frozenset({"1.0", "1.1"})


@dataclass(frozen=True, slots=True)
class Framing:
    """How the end of a body is told.

    Args:
        chunked: by chunks.
        length: by its size in bytes; 0 with chunks, and without a body.
    """

    chunked: bool = False
    length: int = 0

    @property
    def has_body(self) -> bool:
        """Whether there is, or may be, a body."""
        return self.chunked or self.length > 0

    def head(self) -> bytes:
        """A head for a parser that is to read such a body."""
        field = b"Transfer-Encoding: chunked" if self.chunked else b"Content-Length: %d" % self.length
        return b"POST / HTTP/1.1\r\n" + field + b"\r\n\r\n"


def framing_of(version: str, headers: Iterable[tuple[bytes, bytes]]) -> Framing:
    """The framing of a request. The parser has refused contradictory lengths already, and a length beside chunks.

    Args:
        version: of HTTP, such as `1.1`.
        headers: names in lower case.

    Raises:
        MalformedRequest: it could be read in two ways, or is not of HTTP/1.
    """
    if version not in _VERSIONS:
        raise MalformedRequest(f"HTTP/{version} is not spoken here; HTTP/1.1 is.")
    codings, length = [], 0
    for name, value in headers:
        if name == b"transfer-encoding":
            codings.append(value.strip().lower())
        elif name == b"content-length":
            length = int(value)
    if codings and (codings != [b"chunked"] or version == "1.0"):
        raise MalformedRequest("The only Transfer-Encoding of requests is `chunked`, and that in HTTP/1.1.")
    return Framing(bool(codings), length)


def reason_of(error: httptools.HttpParserError) -> Exception:
    """What one of our callbacks raised; else what the parser says, which quotes nothing of the request."""
    raised = error.__context__
    if isinstance(raised, HttpError | Unavailable):
        return raised
    detail = "its parts do not fit together" if raised is not None else str(error) or "it cannot be read"
    return MalformedRequest(f"This is no HTTP request: {detail}.")
