"""The lines of a file, one after the other, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from .input_formats import decompressed
from .listing import Place
from .trouble import explained

MOST_LINE_BYTES = 256 * 1024 * 1024
"""A longer line is not held: somebody's binary file has no line ends at all."""
_CHUNK_BYTES = 1024 * 1024
_SAMPLE_BYTES = 4 * 1024 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """Reads lines from the front of a file, packed or not."""

    def __init__(self, place: Place) -> None:
        self._stack = ExitStack()
        self._file = self._stack.enter_context(decompressed(place.open(), place.key))
        self._ready: list[bytes | None] = []
        self._at = 0
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._begun = self._ended = False

    def read(self, most: int) -> list[bytes | None]:
        """Some lines without their ends, at most `most`; [] behind the last. None is one over `MOST_LINE_BYTES`."""
        while self._at == len(self._ready) and not self._ended:
            self._fill()
        some = self._ready[self._at : self._at + most]
        self._at += len(some)
        return some

    def skip(self, n_lines: int) -> int:
        """Go past lines, without looking at them."""
        left = n_lines
        while left and (some := self.read(left)):
            left -= len(some)
        return n_lines - left

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def _fill(self) -> None:
        chunk = self._file.read(_CHUNK_BYTES)
        self._at = 0
        if chunk:
            first, *others = chunk.split(b"\n")
            self._keep(first)
            self._ready = [self._line(), *others[:-1]] if others else []
            if others:
                self._keep(others[-1])
        else:
            self._ended = True
            self._ready = [self._line()] if self._rest_bytes else []
        if self._ready and not self._begun:
            self._begun = True
            self._ready[0] = self._ready[0] and self._ready[0].removeprefix(_BYTE_ORDER_MARK)

    def _keep(self, piece: bytes) -> None:
        self._rest_bytes += len(piece)
        if self._rest_bytes > MOST_LINE_BYTES:
            self._rest.clear()
        else:
            self._rest.append(piece)

    def _line(self) -> bytes | None:
        line = None if self._rest_bytes > MOST_LINE_BYTES else b"".join(self._rest)
        self._rest, self._rest_bytes = [], 0
        return line


def lines_per_byte(places: Sequence[Place]) -> float:
    """How many lines there are to a byte of these files as they lie there, packed or not, told by how they begin."""
    n_lines = n_bytes = 0
    for place in places:
        with explained(place.path), place.open() as file, decompressed(file, place.key) as unpacked:
            n_lines += unpacked.read(_SAMPLE_BYTES).count(b"\n")
            n_bytes += file.tell()
    return n_lines / max(1, n_bytes)


def too_long() -> str:
    """What is said of a line that is not held."""
    return f"The line is longer than {MOST_LINE_BYTES:,} bytes."
