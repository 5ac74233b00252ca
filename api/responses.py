"""The same vectors as lists of floats, as base64, or as one block of bytes.

`native` byte order is little-endian: that is how vectors travel on the queue, what x86 and ARM have, and what clients
that decode `base64` in their own order expect.
"""

from __future__ import annotations

import asyncio
import binascii
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from embedstream.producer import Embeddings, Prepared
from embedstream.shared.errors import JobFailed
from embedstream.shared.options import VectorType

from .schemas import Endianness

# A large response is made in pieces of about 2 ms (measured: 35 ns a float, 2 ns a byte of base64) with a turn for
# other requests between them. A thread would not help: orjson and binascii keep the interpreter lock.
_PIECE_FLOATS = 50_000
_PIECE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every form says beside the vectors.

    Args:
        id: `embd-` and the request id.
        created: Unix time in seconds.
        model: first served name.
        tokens: of all inputs, after truncation.
    """

    id: str
    created: int
    model: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the block of bytes is laid out.

    Args:
        inputs: number of vectors.
        dim: components of each.
        dtype: number format of a component.
        endianness: as the request named it.
    """

    inputs: int
    dim: int
    dtype: VectorType
    endianness: Endianness

    @classmethod
    def expected(cls, prepared: Prepared, endianness: Endianness) -> Layout:
        """The layout that the result of a request will have."""
        vectors = prepared.options.vectors
        dim = prepared.dimension or 0  # of a model nobody has announced yet the result tells
        return cls(prepared.n_inputs, dim, vectors.dtype, endianness)


def metadata(envelope: Envelope, layout: Layout) -> str:
    """The `metadata` header of the form `bytes`: compact ASCII JSON that says where each vector is.

    Its size grows with the number of inputs, about 115 bytes each; clients refuse headers they find too long.
    """
    size = layout.dim * layout.dtype.numpy.itemsize
    entries = ", ".join(  # written out: for 2,048 inputs json.dumps takes four times as long
        f'{{"index": {index}, "embed_dtype": "{layout.dtype}", "endianness": "{layout.endianness}", '
        f'"start": {index * size}, "end": {(index + 1) * size}, "shape": [{layout.dim}]}}'
        for index in range(layout.inputs)
    )
    return (
        f'{{"id": {json.dumps(envelope.id)}, "created": {envelope.created}, "model": {json.dumps(envelope.model)}, '
        f'"data": [{entries}], '
        f'"usage": {{"prompt_tokens": {envelope.tokens}, "total_tokens": {envelope.tokens}}}}}'
    )


def pack(vectors: NDArray[np.generic], endianness: Endianness) -> NDArray[np.uint8]:
    """The vectors' bytes in the order asked for.

    Args:
        vectors: (inputs, dim), little-endian, any number format.
        endianness: `native` or `little` for as they are, `big` for swapped.

    Returns:
        (inputs, dim x bytes of a component)
    """
    rows = np.ascontiguousarray(vectors)
    if endianness == "big":
        # As plain words: bfloat16 and fp8 are no types of numpy's own, and have no byte order to change.
        rows = rows.view(np.dtype(f"u{rows.itemsize}")).byteswap()
    return rows.view(np.uint8)


def float_pieces(vectors: NDArray[np.generic]) -> Iterator[bytes]:
    """The items of `data` with lists of floats, some at a time: JSON objects with commas between them.

    Args:
        vectors: (inputs, dim) float32

    Raises:
        JobFailed: a component is not finite; JSON has no number for it, and orjson would write null.
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    step = max(1, _PIECE_FLOATS // rows.shape[1])
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        if not np.isfinite(block).all():
            raise JobFailed("A vector holds NaN or infinity.")
        yield _items(first, block)


def base64_pieces(packed: NDArray[np.uint8]) -> Iterator[bytes]:
    """The items of `data` with base64 in the standard alphabet, some at a time.

    Args:
        packed: (inputs, bytes of a vector)
    """
    step = max(1, _PIECE_BYTES // packed.shape[1])
    for first in range(0, len(packed), step):
        texts = (binascii.b2a_base64(row, newline=False).decode() for row in packed[first : first + step])
        yield _items(first, texts)


def _items(first: int, embeddings: Iterable[object]) -> bytes:
    items = [
        {"index": index, "object": "embedding", "embedding": embedding}
        for index, embedding in enumerate(embeddings, first)
    ]
    return orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


async def json_response(envelope: Envelope, pieces: Iterable[bytes], headers: dict[str, str]) -> Response:
    """The response with vectors in JSON.

    Args:
        envelope: the fields beside `data`.
        pieces: the items of `data`.
        headers: sent along.
    """
    head = {"id": envelope.id, "object": "list", "created": envelope.created, "model": envelope.model}
    usage = {
        "prompt_tokens": envelope.tokens,
        "total_tokens": envelope.tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    data = []
    for piece in pieces:
        data.append(piece)
        await asyncio.sleep(0)
    content = b"".join(
        (orjson.dumps(head)[:-1], b',"data":[', b",".join(data), b'],"usage":', orjson.dumps(usage), b"}")
    )
    return Response(content, headers=headers, media_type="application/json")


def bytes_response(packed: NDArray[np.uint8], headers: dict[str, str]) -> Response:
    """The response with all vectors in one block, in the order of the inputs and with nothing between them."""
    return Response(packed.tobytes(), headers=headers, media_type="application/octet-stream")


def timing_headers(result: Embeddings, total_s: float) -> dict[str, str]:
    """Where the time went, in milliseconds; what was computed, in tokens; and how many inputs were cut, even if 0.

    Args:
        result: its timing names the longest wait and the longest forward pass among the request's jobs.
        total_s: from the first look at the request to the finished response.
    """
    return {
        "x-queue-time-ms": f"{result.timing.queue_us / 1000:.1f}",
        "x-inference-time-ms": f"{result.timing.inference_us / 1000:.1f}",
        "x-total-time-ms": f"{total_s * 1000:.1f}",
        "x-compute-tokens": str(result.timing.compute_tokens),
        "x-truncated-inputs": str(result.truncated),
    }
