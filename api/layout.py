"""How a block of packed vectors is laid out, and the `metadata` header that says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InvalidInput
from embedstream.shared.options import VectorType

from .schemas import Endianness


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every form says beside the vectors.

    Args:
        id: what kind of answer it is, and the request id.
        created: Unix time in seconds.
        model: first served name.
        tokens: of all inputs that got a vector, after truncation.
    """

    id: str
    created: int
    model: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the block of bytes is laid out.

    Args:
        tokens: (inputs,) of each input.
        dim: components of a vector.
        dtype: number format of a component.
        endianness: as the request named it.
        per_token: whether an input has a vector for each of its tokens.
    """

    tokens: NDArray[np.uint32]
    dim: int
    dtype: VectorType
    endianness: Endianness
    per_token: bool = False

    @property
    def n_inputs(self) -> int:
        """Number of inputs."""
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens of all inputs."""
        return int(self.tokens.sum(dtype=np.int64))

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return self.dim * self.dtype.numpy.itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole block."""
        return self.vector_bytes * (self.n_tokens if self.per_token else self.n_inputs)

    def places(self) -> Iterator[tuple[int, int, str]]:
        """Where each input's vectors are: the first byte, the byte behind the last, and the shape as JSON."""
        if not self.per_token:
            size, shape = self.vector_bytes, f"[{self.dim}]"
            yield from ((index * size, (index + 1) * size, shape) for index in range(self.n_inputs))
            return
        start = 0
        for count in self.tokens.tolist():
            end = start + count * self.vector_bytes
            yield start, end, f"[{count}, {self.dim}]"
            start = end


def metadata(envelope: Envelope, layout: Layout) -> str:
    """The `metadata` header of the form `bytes`: compact ASCII JSON that says where each vector is.

    Its size grows with the number of inputs, about 115 bytes each; clients refuse headers they find too long.
    """
    entries = ", ".join(  # written out: for 2,048 inputs json.dumps takes four times as long
        f'{{"index": {index}, "embed_dtype": "{layout.dtype}", "endianness": "{layout.endianness}", '
        f'"start": {start}, "end": {end}, "shape": {shape}}}'
        for index, (start, end, shape) in enumerate(layout.places())
    )
    return (
        f'{{"id": {json.dumps(envelope.id)}, "created": {envelope.created}, "model": {json.dumps(envelope.model)}, '
        f'"data": [{entries}], '
        f'"usage": {{"prompt_tokens": {envelope.tokens}, "total_tokens": {envelope.tokens}}}}}'
    )


_LEAST_ENTRY_BYTES = 90
"""Of one input in the header, with one digit for every number."""


def bounded_metadata(envelope: Envelope, layout: Layout, limit: int) -> str:
    """The header, if it is short enough.

    Raises:
        InvalidInput: it has more than `limit` bytes.
    """
    size = layout.n_inputs * _LEAST_ENTRY_BYTES  # that much can be told without making it
    header = metadata(envelope, layout) if size <= limit else ""
    if max(size, len(header)) > limit:
        has = f"{len(header)}" if header else f"at least {size}"
        raise InvalidInput(
            f"The `metadata` header for {layout.n_inputs} inputs has {has} bytes, more than the limit of {limit} "
            "(--metadata-limit-bytes). Use encoding_format `bytes_only`, or send the request header "
            "`x-metadata: omit`.",
            param="encoding_format",
        )
    return header
