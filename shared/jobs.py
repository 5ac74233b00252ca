"""The job: a slice of a request, one stream entry. Version 1 of its wire format, told in `docs/wire-format.md`.

A job holds columns, never an object for each text: one array of token ids and one of lengths. Decoding checks every
bound before it allocates, and any byte string that is not a job raises `MalformedJob`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import MalformedJob
from .lanes import LANES, Lane
from .options import VECTOR_TYPES, VectorOptions

VERSION = 1
MAX_INPUTS = 64
"""Inputs in one job: small enough that several devices share one request."""
MAX_TOKENS = 16_384
"""Tokens in one job of several inputs; a longer input is a job alone."""
MAX_BODY_BYTES = 256 * 1024
MAX_STRING_BYTES = 255
"""Of a name in the header."""
NO_FINGERPRINT = bytes(16)
"""The fingerprint of a text job: the consumer tokenises, so no card can be stale."""


def longest_input(vocab_size: int) -> int:
    """Tokens of the longest input a job can carry: ids of a large vocabulary take four bytes instead of two."""
    return (MAX_BODY_BYTES - 4) // (2 if vocab_size <= 2**16 else 4)


_MAGIC = b"EJ"
_HEADER = struct.Struct("<2sBB16s16sIIIIIIIIIBBBBBBBB")
_FLAG_TEXT, _FLAG_WIDE_IDS, _FLAG_NO_SPECIALS, _FLAG_PER_TOKEN = 1, 2, 4, 8
_KNOWN_FLAGS = 15
_NORMALIZE: tuple[bool | None, ...] = (None, True, False)
_MAX_U32 = 2**32 - 1

T = TypeVar("T")


class LongInputs(IntEnum):
    """What becomes of an input longer than its limit. The value is the code on the wire."""

    ERROR = 0
    TRUNCATE = 1
    CHUNK = 2


class TruncationSide(IntEnum):
    """The end that loses tokens. MODEL keeps the special tokens; the others slice the finished sequence."""

    MODEL = 0
    RIGHT = 1
    LEFT = 2


@dataclass(frozen=True, slots=True)
class Job:
    """A slice of at most 64 inputs of one request.

    Either `ids` or `texts` is given. `lengths` counts tokens for ids and UTF-8 bytes for texts.

    Args:
        request_id: 16 bytes, the key of the result.
        index: which job of the request this is, from 0.
        count: how many jobs the request has.
        first_input: position in the request of this job's first input.
        ttl_ms: milliseconds from enqueueing (on Redis's clock) after which nobody waits for the result.
        lengths: (inputs,) uint32.
        ids: (sum of lengths,) uint16 or uint32 token ids, special tokens included.
        texts: the inputs as text, for producers without a tokenizer.
        fingerprint: 16 bytes naming the model card the ids were made with; zero for texts.
        lane: the lane it was sent on; kept so that a replay finds its way back.
        options: what the vectors should look like.
        result_ttl_s: seconds to keep the result under a key of its own; 0 for the reply stream only.
        long_inputs: policy for inputs over the limit.
        truncate_to: token limit of an input with TRUNCATE; 0 for the model's own.
        truncation_side: the end that loses tokens.
        add_special_tokens: for texts: whether the tokenizer adds them.
        adapter: adapter of the model, or "" for its default.
        prompt_name: for texts: which prompt the consumer is to put before each, as `Recipe.prompt_of` takes it: "" is
            the model's default. For ids: the prompt they begin with, by its name in the recipe, "" for none.
        traceparent: W3C trace context, or "".
        tenant: who pays, or "".
    """

    request_id: bytes
    index: int
    count: int
    first_input: int
    ttl_ms: int
    lengths: NDArray[np.uint32]
    ids: NDArray[np.uint16] | NDArray[np.uint32] | None = None
    texts: tuple[str, ...] | None = None
    fingerprint: bytes = NO_FINGERPRINT
    lane: Lane = Lane.INTERACTIVE
    options: VectorOptions = field(default_factory=VectorOptions)
    result_ttl_s: int = 0
    long_inputs: LongInputs = LongInputs.ERROR
    truncate_to: int = 0
    truncation_side: TruncationSide = TruncationSide.MODEL
    add_special_tokens: bool = True
    adapter: str = ""
    prompt_name: str = ""
    traceparent: str = ""
    tenant: str = ""

    @property
    def n_inputs(self) -> int:
        """Number of inputs."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Number of tokens; 0 when the job carries text."""
        return 0 if self.ids is None else len(self.ids)

    def encode(self) -> tuple[bytes, bytes]:
        """The entry's header and body.

        Raises:
            MalformedJob: the job breaks a limit of the format.
        """
        body = self._encode_body()
        flags = (
            (_FLAG_TEXT if self.texts is not None else 0)
            | (_FLAG_WIDE_IDS if self.ids is not None and self.ids.dtype.itemsize == 4 else 0)
            | (0 if self.add_special_tokens else _FLAG_NO_SPECIALS)
            | (_FLAG_PER_TOKEN if self.options.per_token else 0)
        )
        try:
            fixed = _HEADER.pack(
                _MAGIC,
                VERSION,
                flags,
                self.request_id,
                self.fingerprint,
                self.index,
                self.count,
                self.first_input,
                self.n_inputs,
                self.n_tokens,
                self.ttl_ms,
                self.result_ttl_s,
                self.options.dimensions or 0,
                self.truncate_to,
                _NORMALIZE.index(self.options.normalize),
                VECTOR_TYPES.index(self.options.dtype),
                LANES.index(self.lane),
                self.long_inputs,
                self.truncation_side,
                0,
                0,
                0,
            )
        except struct.error as error:
            raise MalformedJob(f"a field of the job does not fit its place: {error}") from error
        strings = b"".join(
            _encode_string(text) for text in (self.adapter, self.prompt_name, self.traceparent, self.tenant)
        )
        header = fixed + strings
        decode_header(header)  # one set of rules: what we would refuse to read, we do not write
        return header, body

    def _encode_body(self) -> bytes:
        lengths = self.lengths.astype("<u4", copy=False)
        if self.ids is not None:
            width = "<u2" if self.ids.dtype.itemsize == 2 else "<u4"
            data = self.ids.astype(width, copy=False).tobytes()
        else:
            data = "".join(self.texts or ()).encode()
        body = lengths.tobytes() + data
        if len(body) > MAX_BODY_BYTES:
            raise MalformedJob(f"the body has {len(body)} bytes, more than {MAX_BODY_BYTES}")
        return body


@dataclass(frozen=True, slots=True)
class _Header:
    flags: int
    n_inputs: int
    n_tokens: int
    fields: dict[str, Any]  # of the job: all that the body does not hold


def text_lengths(texts: tuple[str, ...]) -> NDArray[np.uint32]:
    """The `lengths` column of a text job: UTF-8 bytes of each text."""
    return np.fromiter((len(text.encode()) for text in texts), np.uint32, len(texts))


class Sender(NamedTuple):
    """Who sent a job, as far as a damaged header tells."""

    request_id: bytes
    job: int
    n_jobs: int
    first_input: int
    n_inputs: int


def sender_of(header: bytes) -> Sender | None:
    """Read just enough of a header that is damaged further on to answer its sender; None when it is no header."""
    if len(header) < _HEADER.size or header[:2] != _MAGIC:
        return None
    fields = _HEADER.unpack_from(header)
    sender = Sender(fields[3], *fields[5:9])
    return sender if sender.job < sender.n_jobs and 1 <= sender.n_inputs <= MAX_INPUTS else None


def decode(header: bytes, body: bytes) -> Job:
    """Read a job from its stream entry; arrays are views of `body`.

    Raises:
        MalformedJob: the bytes do not follow the format.
    """
    head = decode_header(header)
    if len(body) > MAX_BODY_BYTES:
        raise MalformedJob(f"the body has {len(body)} bytes, more than {MAX_BODY_BYTES}")
    table = 4 * head.n_inputs
    if len(body) < table:
        raise MalformedJob(f"the body ends within the lengths of its {head.n_inputs} inputs")
    lengths: NDArray[np.uint32] = np.frombuffer(body, "<u4", head.n_inputs)
    total = int(lengths.sum(dtype=np.uint64))
    data = body[table:]
    if head.flags & _FLAG_TEXT:
        if total != len(data):
            raise MalformedJob(f"the lengths add up to {total} bytes of text, the body has {len(data)}")
        return Job(**head.fields, lengths=lengths, texts=_split_texts(data, lengths))
    if not lengths.all():
        raise MalformedJob(f"input {int(np.argmin(lengths))} has no tokens")
    width = 4 if head.flags & _FLAG_WIDE_IDS else 2
    if total != head.n_tokens or total * width != len(data):
        raise MalformedJob(
            f"{head.n_tokens} tokens announced, lengths add up to {total}, the body has {len(data)} bytes of ids"
        )
    ids: NDArray[np.uint16] | NDArray[np.uint32] = np.frombuffer(data, "<u4" if width == 4 else "<u2")
    return Job(**head.fields, lengths=lengths, ids=ids)


def decode_header(header: bytes) -> _Header:
    """Read and check everything but the body.

    Raises:
        MalformedJob: the bytes do not follow the format.
    """
    if len(header) < _HEADER.size:
        raise MalformedJob(f"the header has {len(header)} bytes, fewer than {_HEADER.size}")
    (
        magic,
        version,
        flags,
        request_id,
        fingerprint,
        index,
        count,
        first_input,
        n_inputs,
        n_tokens,
        ttl_ms,
        result_ttl_s,
        dimensions,
        truncate_to,
        normalize,
        dtype,
        lane,
        long_inputs,
        side,
        *reserved,
    ) = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        raise MalformedJob(f"the header begins with {magic!r}, not {_MAGIC!r}")
    if version != VERSION:
        raise MalformedJob(f"version {version} of the job format; this side reads version {VERSION}")
    if flags & ~_KNOWN_FLAGS or any(reserved):
        raise MalformedJob(f"flags {flags:#04x} or reserved bytes {reserved} have a meaning this version does not know")
    if flags & _FLAG_TEXT and flags & _FLAG_WIDE_IDS:
        raise MalformedJob("a job carries text or token ids, not both")
    if not 1 <= n_inputs <= MAX_INPUTS:
        raise MalformedJob(f"{n_inputs} inputs; a job has 1 to {MAX_INPUTS}")
    if n_inputs > 1 and n_tokens > MAX_TOKENS:
        raise MalformedJob(f"{n_tokens} tokens in {n_inputs} inputs; several inputs share at most {MAX_TOKENS}")
    if index >= count:
        raise MalformedJob(f"job {index} of a request of {count}")
    if first_input + n_inputs > _MAX_U32:
        raise MalformedJob(f"first input {first_input} is out of range")
    if ttl_ms == 0:
        raise MalformedJob("ttl_ms is 0: the job would be expired before it is read")
    strings, end = _decode_strings(header)
    if end != len(header):
        raise MalformedJob(f"{len(header) - end} bytes after the end of the header")
    fields: dict[str, Any] = {
        "request_id": request_id,
        "index": index,
        "count": count,
        "first_input": first_input,
        "ttl_ms": ttl_ms,
        "fingerprint": fingerprint,
        "lane": _choose(LANES, lane, "lane"),
        "options": VectorOptions(
            dimensions=dimensions or None,
            normalize=_choose(_NORMALIZE, normalize, "normalize"),
            dtype=_choose(VECTOR_TYPES, dtype, "dtype"),
            per_token=bool(flags & _FLAG_PER_TOKEN),
        ),
        "result_ttl_s": result_ttl_s,
        "long_inputs": _choose(tuple(LongInputs), long_inputs, "long_inputs"),
        "truncate_to": truncate_to,
        "truncation_side": _choose(tuple(TruncationSide), side, "truncation_side"),
        "add_special_tokens": not flags & _FLAG_NO_SPECIALS,
        "adapter": strings[0],
        "prompt_name": strings[1],
        "traceparent": strings[2],
        "tenant": strings[3],
    }
    return _Header(flags, n_inputs, n_tokens, fields)


def _choose(values: tuple[T, ...], code: int, name: str) -> T:
    if code >= len(values):
        raise MalformedJob(f"{name} code {code}; known are 0 to {len(values) - 1}")
    return values[code]


def _encode_string(text: str) -> bytes:
    data = text.encode()
    if len(data) > MAX_STRING_BYTES:
        raise MalformedJob(f"a header string has {len(data)} bytes, more than {MAX_STRING_BYTES}")
    return bytes((len(data),)) + data


def _decode_strings(header: bytes) -> tuple[list[str], int]:
    at, strings = _HEADER.size, []
    for name in ("adapter", "prompt_name", "traceparent", "tenant"):
        end = at + 1 + header[at] if at < len(header) else at + 1
        if end > len(header):
            raise MalformedJob(f"the header ends within {name}")
        try:
            strings.append(header[at + 1 : end].decode())
        except UnicodeDecodeError as error:
            raise MalformedJob(f"{name} is not UTF-8") from error
        at = end
    return strings, at


def _split_texts(data: bytes, lengths: NDArray[np.uint32]) -> tuple[str, ...]:
    ends = np.cumsum(lengths, dtype=np.uint64).tolist()
    try:
        return tuple(data[end - size : end].decode() for end, size in zip(ends, lengths.tolist(), strict=True))
    except UnicodeDecodeError as error:
        raise MalformedJob("a text is not UTF-8") from error
