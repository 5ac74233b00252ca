"""Results: parts of a job's answer. Version 1 of their wire format, told in `docs/wire-format.md`.

A part holds at most 1 MiB: a header, a table of rows, the messages of failed rows, and one block of vectors. Decoding
is idempotent by (request, job, part), so a part that comes twice changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MalformedResult
from .options import VECTOR_TYPES, VectorType

VERSION = 1
MAX_PART_BYTES = 1024 * 1024

_MAGIC = b"ER"
_HEADER = struct.Struct("<2sBB16s16sIIIIIIIIIIHH")
_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_BYTES = 1024

ROW = np.dtype([("status", "u1"), ("flags", "u1"), ("message", "<u2"), ("vectors", "<u4"), ("tokens", "<u4")])
"""One entry of the row table: status, flags, number of its message + 1, vectors in this part, tokens it was made of."""

ROW_TRUNCATED = 1
"""Row flag: the input was longer than its limit and lost tokens, as its sender had asked."""
ROW_CONTINUES = 2
"""Row flag: more vectors of this row follow in the next part."""


class Status(IntEnum):
    """What became of a row. The value is the code on the wire."""

    OK = 0
    INVALID_INPUT = 1
    INPUT_TOO_LONG = 2
    STALE_CARD = 3
    EXPIRED = 4
    FAILED = 5
    NOT_SERVED = 6


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a job's time went, in microseconds, and the tokens its forward passes computed for it."""

    queue_us: int = 0
    inference_us: int = 0
    compute_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ResultPart:
    """A slice of one job's answer.

    Args:
        request_id: 16 bytes.
        fingerprint: the card of the consumer that answered.
        job: which job of the request.
        n_jobs: how many jobs the request has.
        part: which part of the job.
        n_parts: how many parts the job's answer has.
        first_row: position in the request of the first row.
        rows: (rows,) of dtype `ROW`.
        vectors: (sum of rows["vectors"], dim), the rows' vectors one after another.
        dtype: number format of `vectors`.
        messages: texts that `rows["message"]` counts, from 1.
        timing: where the time went.
    """

    request_id: bytes
    fingerprint: bytes
    job: int
    n_jobs: int
    part: int
    n_parts: int
    first_row: int
    rows: NDArray[np.void]
    vectors: NDArray[Any]
    dtype: VectorType
    messages: tuple[str, ...] = ()
    timing: Timing = field(default_factory=Timing)

    @property
    def n_rows(self) -> int:
        """Rows in this part."""
        return len(self.rows)

    def message(self, row: int) -> str:
        """The message of a row of this part, or "" for none."""
        number = int(self.rows["message"][row])
        return self.messages[number - 1] if number else ""

    def encode(self) -> bytes:
        """The part's bytes."""
        texts = [message.encode()[:_MAX_MESSAGE_BYTES] for message in self.messages]
        header = _HEADER.pack(
            _MAGIC,
            VERSION,
            VECTOR_TYPES.index(self.dtype),
            self.request_id,
            self.fingerprint,
            self.job,
            self.n_jobs,
            self.part,
            self.n_parts,
            self.first_row,
            self.n_rows,
            self.vectors.shape[1],
            min(self.timing.queue_us, 2**32 - 1),
            min(self.timing.inference_us, 2**32 - 1),
            min(self.timing.compute_tokens, 2**32 - 1),
            len(texts),
            0,
        )
        messages = b"".join(struct.pack("<H", len(text)) + text for text in texts)
        return b"".join((header, self.rows.tobytes(), messages, self.vectors.tobytes()))


def decode(data: bytes) -> ResultPart:
    """Read one part; arrays are views of `data`.

    Raises:
        MalformedResult: the bytes do not follow the format.
    """
    if len(data) < _HEADER.size:
        raise MalformedResult(f"a part of {len(data)} bytes, fewer than its header's {_HEADER.size}")
    (
        magic,
        version,
        dtype,
        request_id,
        fingerprint,
        job,
        n_jobs,
        part,
        n_parts,
        first_row,
        n_rows,
        dim,
        queue_us,
        inference_us,
        compute_tokens,
        n_messages,
        reserved,
    ) = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != VERSION or reserved:
        raise MalformedResult(f"magic {magic!r}, version {version}, reserved {reserved}; expected {_MAGIC!r}, 1, 0")
    if dtype >= len(VECTOR_TYPES) or job >= n_jobs or part >= n_parts or not n_rows:
        raise MalformedResult(f"dtype {dtype}, job {job} of {n_jobs}, part {part} of {n_parts}, {n_rows} rows")
    at = _HEADER.size + n_rows * ROW.itemsize
    if len(data) < at:
        raise MalformedResult(f"the part ends within the table of its {n_rows} rows")
    rows = np.frombuffer(data, ROW, n_rows, _HEADER.size)
    messages, at = _decode_messages(data, at, n_messages)
    if int(rows["message"].max()) > n_messages or int(rows["status"].max()) >= len(Status):
        raise MalformedResult("a row has an unknown status or message number")
    kind = VECTOR_TYPES[dtype]
    n_vectors = int(rows["vectors"].sum(dtype=np.uint64))
    expected = n_vectors * dim * kind.numpy.itemsize
    if len(data) - at != expected:
        raise MalformedResult(f"{len(data) - at} bytes of vectors, the table announces {expected}")
    return ResultPart(
        request_id=request_id,
        fingerprint=fingerprint,
        job=job,
        n_jobs=n_jobs,
        part=part,
        n_parts=n_parts,
        first_row=first_row,
        rows=rows,
        vectors=np.frombuffer(data, kind.numpy, n_vectors * dim, at).reshape(n_vectors, dim),
        dtype=kind,
        messages=messages,
        timing=Timing(queue_us, inference_us, compute_tokens),
    )


def split(whole: ResultPart, max_bytes: int = MAX_PART_BYTES) -> list[ResultPart]:
    """Cut a job's answer into parts of at most `max_bytes`.

    A row with many vectors may go on in the next part, which then begins with that row again; `ROW_CONTINUES` marks
    the earlier piece. Rows without vectors travel with their neighbours.
    """
    fixed = _HEADER.size + sum(2 + len(message.encode()) for message in whole.messages)
    vector_bytes = max(1, whole.vectors.shape[1] * whole.dtype.numpy.itemsize)
    if fixed + whole.rows.nbytes + whole.vectors.nbytes <= max_bytes:
        return [whole]
    # Every piece leaves room for the whole row table, so all fit; where it is cut depends on which rows failed, too.
    room = max(1, (max_bytes - fixed - whole.rows.nbytes) // vector_bytes)
    pieces: list[list[tuple[int, int]]] = [[]]  # for each piece: (row, vectors of it)
    used = 0
    for row, vectors in enumerate(whole.rows["vectors"].tolist()):
        left = vectors
        while left > room - used:
            if room > used:
                pieces[-1].append((row, room - used))
                left -= room - used
            pieces.append([])
            used = 0
        pieces[-1].append((row, left))
        used += left
    starts = np.cumsum([0, *(sum(vectors for _, vectors in piece) for piece in pieces)])
    return [
        _piece(whole, piece, number, len(pieces), int(start))
        for number, (piece, start) in enumerate(zip(pieces, starts, strict=False))
    ]


def _piece(whole: ResultPart, piece: list[tuple[int, int]], number: int, count: int, start: int) -> ResultPart:
    first, end = piece[0][0], piece[-1][0] + 1
    rows = whole.rows[first:end].copy()
    rows["vectors"] = [vectors for _, vectors in piece]
    vectors = whole.vectors[start : start + int(rows["vectors"].sum(dtype=np.int64))]
    if start + len(vectors) < int(whole.rows["vectors"][:end].sum(dtype=np.int64)):
        rows["flags"][-1] |= ROW_CONTINUES
    return replace(whole, part=number, n_parts=count, first_row=whole.first_row + first, rows=rows, vectors=vectors)


def is_one_answer(parts: Sequence[ResultPart]) -> bool:
    """Whether the parts of a job follow one another row by row, as those of one answer do.

    Two consumers may have cut their answers to one job at different rows, when different rows failed: part 0 of the one
    and part 1 of the other are as many as there should be, and yet miss a row or bring it twice.

    Args:
        parts: in order, from the first to the last.
    """
    if len(parts) == 1:
        return not parts[0].rows["flags"][-1] & ROW_CONTINUES
    next_row = parts[0].first_row
    for part in parts:
        if part.first_row != next_row:
            return False
        next_row = part.first_row + part.n_rows - bool(part.rows["flags"][-1] & ROW_CONTINUES)
    rows = np.concatenate([part.rows for part in parts])
    ends = np.flatnonzero(rows["flags"] & ROW_CONTINUES == 0)  # a row that goes on is told again by its last piece
    if not len(ends) or ends[-1] != len(rows) - 1:
        return False
    vectors = np.diff(np.cumsum(rows["vectors"], dtype=np.int64)[ends], prepend=0)
    # A part may also begin with the rest of a row that the part before it did not begin: count the vectors of each row.
    good = rows["status"][ends] == Status.OK
    of_good = vectors[good]
    as_told = (of_good == 1).all() or (of_good == rows["tokens"][ends][good]).all()
    return bool(as_told and not vectors[~good].any())


def frame(parts: Iterable[bytes]) -> bytes:
    """Several encoded parts as one reply entry: each with its length before it."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unframe(data: bytes) -> Iterator[bytes]:
    """The encoded parts of one reply entry. They may belong to several callers: one that is damaged harms no other.

    Raises:
        MalformedResult: a length leads past the end.
    """
    at = 0
    while at < len(data):
        if len(data) - at < _LENGTH.size:
            raise MalformedResult("a reply ends within the length of a part")
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if size > len(data) - at:
            raise MalformedResult(f"a reply announces a part of {size} bytes and has {len(data) - at}")
        yield data[at : at + size]
        at += size


def failed(
    request_id: bytes,
    fingerprint: bytes,
    job: int,
    n_jobs: int,
    first_row: int,
    n_rows: int,
    status: Status,
    message: str,
) -> ResultPart:
    """The answer to a job none of whose rows has a vector, all for one reason."""
    rows = np.zeros(n_rows, ROW)
    rows["status"], rows["message"] = status, 1
    vectors = np.empty((0, 0), VectorType.FLOAT32.numpy)
    return ResultPart(
        request_id, fingerprint, job, n_jobs, 0, 1, first_row, rows, vectors, VectorType.FLOAT32, (message,)
    )


def _decode_messages(data: bytes, at: int, count: int) -> tuple[tuple[str, ...], int]:
    messages = []
    for _ in range(count):
        if len(data) - at < 2:
            raise MalformedResult("the part ends within its messages")
        (size,) = struct.unpack_from("<H", data, at)
        if size > len(data) - at - 2:
            raise MalformedResult("the part ends within a message")
        messages.append(data[at + 2 : at + 2 + size].decode(errors="replace"))
        at += 2 + size
    return tuple(messages), at
