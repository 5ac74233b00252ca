"""The same vectors as lists of floats, as base64, or as one block of bytes.

`native` byte order is little-endian: that is how vectors travel on the queue, what x86 and ARM have, and what clients
that decode `base64` in their own order expect.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from embedstream.producer import EmbeddedSlice
from embedstream.shared.results import Timing

from .errors import error_fields
from .schemas import EncodingFormat, Endianness

# JSON is made in pieces of about 1 ms (measured: 35 ns a float, 2 ns a byte of base64) with a turn for other requests
# between them. A thread would not help: orjson and binascii keep the interpreter lock.
_PIECE_FLOATS = 30_000
_PIECE_BYTES = 400_000
_PIECE_ITEMS = 128  # short vectors cost by their number


@dataclass(frozen=True, slots=True)
class Kind:
    """What the items of `data` are called.

    Args:
        object: of an item.
        field: of an item, which holds the vector.
        id_prefix: before the request id in the response's id.
    """

    object: str
    field: str
    id_prefix: str


EMBEDDING = Kind("embedding", "embedding", "embd-")
POOLING = Kind("pooling", "data", "pooling-")


@dataclass(frozen=True, slots=True)
class Form:
    """The form of an answer.

    Args:
        encoding: how the vectors travel.
        endianness: byte order of the packed forms, as the request named it.
        kind: of items.
        per_token: whether an item is a matrix with one vector for each token.
        least_tokens: usage counts an input with so many tokens at least: those it would have with padding.
    """

    encoding: EncodingFormat
    endianness: Endianness
    kind: Kind = EMBEDDING
    per_token: bool = False
    least_tokens: int = 0

    def usage(self, tokens: NDArray[np.uint32]) -> int:
        """The tokens that usage counts.

        Args:
            tokens: (inputs,) of each input; 0 for one that got no vector.
        """
        return int(np.where(tokens > 0, np.maximum(tokens, self.least_tokens), 0).sum(dtype=np.int64))

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON; if not, it is one block of bytes."""
        return self.encoding in ("float", "base64")


def pack(vectors: NDArray[np.generic], endianness: Endianness) -> NDArray[np.uint8]:
    """The vectors' bytes in the order asked for.

    Args:
        vectors: (vectors, dim), little-endian, any number format.
        endianness: `native` or `little` for as they are, `big` for swapped.

    Returns:
        (vectors, dim x bytes of a component)
    """
    rows = np.ascontiguousarray(vectors)
    if endianness == "big":
        # As plain words: bfloat16 and fp8 are no types of numpy's own, and have no byte order to change.
        rows = rows.view(np.dtype(f"u{rows.itemsize}")).byteswap()
    return rows.view(np.uint8)


def json_items(piece: EmbeddedSlice, form: Form, failures: Mapping[int, Exception]) -> Iterator[bytes]:
    """The items of `data` as JSON, some at a time and with the commas between them.

    Args:
        piece: vectors in float32 for the form `float`; they are finite, for JSON has no other numbers.
        form: `float` or `base64`, in the standard alphabet.
        failures: of the inputs that have an error in place of a vector, by their place in the request.
    """
    floats = form.encoding == "float"
    vectors = np.ascontiguousarray(piece.vectors)
    bounds = _bounds(piece.tokens, per_token=form.per_token)
    most = max(1, (_PIECE_FLOATS if floats else _PIECE_BYTES // vectors.itemsize) // max(1, vectors.shape[1]))
    most = min(most, _PIECE_ITEMS)
    comma = b""
    for first, end in _groups(bounds, most):
        block = vectors[bounds[first] : bounds[end]]
        if len(block) > most and piece.first + first not in failures:  # one input with many vectors
            yield comma + _head(piece.first + first, form.kind)
            yield from _float_rows(block, most) if floats else _base64_rows(block, form.endianness)
            yield b"}"
        else:
            matrices = (block[bounds[i] - bounds[first] : bounds[i + 1] - bounds[first]] for i in range(first, end))
            values = (matrix if form.per_token or not len(matrix) else matrix[0] for matrix in matrices)
            items = [
                _item(index, form, value) if index not in failures else _error_item(index, failures[index])
                for index, value in enumerate(values, piece.first + first)
            ]
            yield comma + orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        comma = b","


def _bounds(tokens: NDArray[np.uint32], *, per_token: bool) -> NDArray[np.int64]:
    """(inputs + 1,) where the vectors of each input begin."""
    bounds = np.zeros(len(tokens) + 1, np.int64)
    if per_token:
        np.cumsum(tokens, dtype=np.int64, out=bounds[1:])
    else:
        bounds[1:] = np.arange(1, len(bounds))
    return bounds


def _groups(bounds: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of inputs with at most so many vectors, or one input with more."""
    first, n_inputs = 0, len(bounds) - 1
    while first < n_inputs:
        end = int(np.searchsorted(bounds, bounds[first] + most, side="right")) - 1
        end = min(max(first + 1, end), first + most, n_inputs)
        yield first, end
        first = end


def _item(index: int, form: Form, value: NDArray[Any]) -> dict[str, object]:
    shown: object = value
    if form.encoding == "base64":
        matrix = value if value.ndim == 2 else value[None]
        shown = binascii.b2a_base64(pack(matrix, form.endianness).data, newline=False).decode()
    return {"index": index, "object": form.kind.object, form.kind.field: shown}


def _error_item(index: int, error: Exception) -> dict[str, object]:
    return {"index": index, "object": "error", "error": error_fields(error, "")}


def _head(index: int, kind: Kind) -> bytes:
    """The beginning of an item up to its vectors."""
    return b'{"index":%d,"object":"%s","%s":' % (index, kind.object.encode(), kind.field.encode())


def _float_rows(block: NDArray[Any], step: int) -> Iterator[bytes]:
    """A matrix as JSON, some rows at a time."""
    opening = b"["
    for first in range(0, len(block), step):
        yield opening + orjson.dumps(block[first : first + step], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        opening = b","
    yield b"]"


def _base64_rows(block: NDArray[Any], endianness: Endianness) -> Iterator[bytes]:
    """A matrix as a JSON string, a whole number of base64's groups at a time."""
    step = 3 * max(1, _PIECE_BYTES // (3 * block.shape[1] * block.itemsize))
    yield b'"'
    for first in range(0, len(block), step):
        yield binascii.b2a_base64(pack(block[first : first + step], endianness).data, newline=False)
    yield b'"'


def timing_headers(timing: Timing, total_s: float) -> dict[str, str]:
    """Where the time went, in milliseconds, and what was computed, in tokens.

    Args:
        timing: the longest wait and the longest forward pass among the request's jobs, and the sum of their tokens.
        total_s: from the first look at the request to the finished response.
    """
    return {
        "x-queue-time-ms": f"{timing.queue_us / 1000:.1f}",
        "x-inference-time-ms": f"{timing.inference_us / 1000:.1f}",
        "x-total-time-ms": f"{total_s * 1000:.1f}",
        "x-compute-tokens": str(timing.compute_tokens),
    }
