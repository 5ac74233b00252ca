"""A request before it is sent: inputs checked and tokenised, then cut into jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.cards import ChatFormat, ModelCard
from embedstream.shared.chunks import piece_counts, piece_lengths
from embedstream.shared.jobs import MAX_BODY_BYTES, MAX_INPUTS, MAX_TOKENS, Job, LongInputs, TruncationSide
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions
from embedstream.shared.results import Timing
from embedstream.shared.tokenization import Tokens

from .failures import InputFailure
from .rows import RowPlan

Inputs = Sequence[str] | Sequence[Sequence[int] | NDArray[np.integer]] | NDArray[Any]
"""Texts, or one sequence of token ids for each input; an array of texts, or a matrix of ids."""

_MAX_U16 = 2**16
BYTES_A_TOKEN = 4
"""Of text, about, for jobs whose tokens nobody has counted yet."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a request is to be treated.

    Args:
        vectors: size, normalisation and number format of the result.
        truncate_prompt_tokens: cut inputs to this many tokens, whatever `long_inputs` says; -1 for the model's limit.
        add_special_tokens: for texts: whether the tokenizer adds [CLS] and its like.
        lane: interactive, or bulk for work that can wait.
        timeout_s: seconds until the result is no longer wanted; None for the settings' default.
        long_inputs: what becomes of inputs above the model's limit while `truncate_prompt_tokens` is None.
        truncation_side: the end that loses tokens; MODEL keeps the special tokens.
        partial: whether inputs that fail alone leave the others their vectors; if not, they end the request.
        chat: how the texts were made of chat messages; a model that makes others of them does not get them.
        prompt: for texts: what `Recipe.prompt_of` takes: a prompt's name, "" for the model's default, NO_PROMPT, or
            ROLE and a role.
        adapter: of the model; "" for its default.
    """

    vectors: VectorOptions = field(default_factory=VectorOptions)
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    lane: Lane = Lane.INTERACTIVE
    timeout_s: float | None = None
    long_inputs: LongInputs = LongInputs.ERROR
    truncation_side: TruncationSide = TruncationSide.MODEL
    partial: bool = False
    chat: ChatFormat | None = None
    prompt: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that passed every check and is ready to be sent.

    Args:
        card: the revision of the model it was tokenised for; None when it travels as text, for the consumer to
            tokenise: no consumer has told yet what the model is like.
        inputs: what the caller gave, kept to tokenise again should the model change meanwhile.
        tokens: all inputs as columns, in their order; for text without ids, `lengths` counting UTF-8 bytes.
        options: how to treat it.
        asked_for: the model, by the name it has without a card.
        arrived_s: when it came, on the event loop's clock: from then on its time runs. None: when it is sent.
        failures: inputs that were refused already, by their place; they have no tokens. Empty unless `partial`.
        piece_tokens: longer inputs travel in pieces of so many tokens; 0 when each is one row.
        prompt: name of the prompt that was put before its texts, or "" for none; without a card, what was asked for.
        adapter: name of the one that is to compute it, or "" for the bare model; without a card, what was asked for.
    """

    card: ModelCard | None
    inputs: Inputs
    tokens: Tokens
    options: Options
    asked_for: str = ""
    arrived_s: float | None = None
    failures: Mapping[int, InputFailure] = field(default_factory=dict)
    piece_tokens: int = 0
    prompt: str = ""
    adapter: str = ""

    @property
    def model(self) -> str:
        """The model's first served name."""
        return self.asked_for if self.card is None else self.card.model

    @property
    def dimension(self) -> int | None:
        """Components its vectors will have; None while nobody has told."""
        vectors = self.options.vectors
        if self.card is None:
            return vectors.dimensions
        return vectors.dimensions or self.card.recipe.size(per_token=vectors.per_token)

    @property
    def n_inputs(self) -> int:
        """Number of inputs."""
        return len(self.tokens.lengths)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, after truncation, special tokens included."""
        return len(self.tokens.ids)

    @property
    def least_tokens(self) -> int:
        """Tokens it has at least, about: of text that a consumer will tokenise, as many as its bytes make as a rule."""
        if self.card is not None:
            return self.n_tokens
        return -(-int(self.tokens.lengths.sum(dtype=np.int64)) // BYTES_A_TOKEN)

    @property
    def plan(self) -> RowPlan:
        """How its inputs stand as rows on the queue."""
        vectors = self.options.vectors
        if self.card is None:
            counts = np.ones(self.n_inputs, np.uint32)
            counts[list(self.failures)] = 0
            return RowPlan(counts, vectors)  # its consumer cuts, and joins again
        lengths, default = self.tokens.lengths, self.card.recipe.normalize
        counts = piece_counts(lengths, self.piece_tokens) if self.piece_tokens else (lengths > 0).astype(np.uint32)
        return RowPlan(counts, vectors, default if vectors.normalize is None else vectors.normalize)

    @property
    def is_text(self) -> bool:
        """Whether the caller gave texts."""
        return bool(len(self.inputs)) and isinstance(self.inputs[0], str)


@dataclass(frozen=True, slots=True)
class EmbeddedSlice:
    """A finished piece of a request: the inputs from `first` on.

    Args:
        first: place of its first input in the request.
        vectors: as in `Embeddings`; the row of an input that failed is zero, and with `per_token` it has none.
        tokens: (inputs,) tokens each input was made of; 0 for one that failed.
        truncated: how many of its inputs lost tokens; of those that did not fail.
        timing: of the jobs that came with it.
        failures: what became of inputs that failed, by their place in the request; empty unless `partial`.
    """

    first: int
    vectors: NDArray[Any]
    tokens: NDArray[np.uint32]
    truncated: int = 0
    timing: Timing = field(default_factory=Timing)
    failures: Mapping[int, InputFailure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A whole result.

    Args:
        vectors: (inputs, dim) in the number format asked for; for `per_token` options (tokens, dim), the inputs'
            matrices one below the other. The row of an input that failed is zero, and with `per_token` it has none.
        tokens: (inputs,) tokens each input was made of; 0 for one that failed.
        truncated: how many inputs lost tokens; of those that did not fail.
        timing: the longest wait and forward pass among its jobs, and the sum of computed tokens.
        failures: what became of inputs that failed, by their place in the request; empty unless `partial`.
    """

    vectors: NDArray[Any]
    tokens: NDArray[np.uint32]
    truncated: int
    timing: Timing
    failures: Mapping[int, InputFailure] = field(default_factory=dict)


def cut_into_jobs(
    prepared: Prepared, request_id: bytes, ttl_ms: int, result_ttl_s: int = 0, most_rows: int = MAX_INPUTS
) -> list[Job]:
    """Slices of at most 64 rows, 16 k tokens and 256 KiB; a longer row is a job alone. Jobs count rows, not inputs.

    Args:
        prepared: the request.
        request_id: 16 bytes.
        ttl_ms: milliseconds from enqueueing until nobody waits for the result.
        result_ttl_s: seconds to keep the result under the request's id; 0 to send it to the caller only.
        most_rows: of a job, where that is less than 64.
    """
    if prepared.card is None:
        return _cut_texts(prepared, request_id, ttl_ms, result_ttl_s, most_rows)
    lengths, plan, most = prepared.tokens.lengths, prepared.plan, prepared.piece_tokens
    lengths = piece_lengths(lengths, plan.counts, most) if most else lengths[lengths > 0]
    options = plan.travelling
    width = np.uint16 if prepared.card.recipe.vocab_size <= _MAX_U16 else np.uint32
    ids: NDArray[Any] = prepared.tokens.ids.astype(width, copy=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    most_tokens = min(MAX_TOKENS, (MAX_BODY_BYTES - 4 * MAX_INPUTS) // ids.itemsize)
    slices = list(_slices(ends, most_tokens, most_rows))
    fingerprint = prepared.card.fingerprint
    return [
        Job(
            request_id=request_id,
            index=index,
            count=len(slices),
            first_input=first,
            ttl_ms=ttl_ms,
            lengths=lengths[first:end],
            ids=ids[int(ends[first]) - int(lengths[first]) : int(ends[end - 1])],
            fingerprint=fingerprint,
            lane=prepared.options.lane,
            options=options,
            result_ttl_s=result_ttl_s,
            add_special_tokens=prepared.options.add_special_tokens,
            adapter=prepared.adapter,
            prompt_name=prepared.prompt,
        )
        for index, (first, end) in enumerate(slices)
    ]


def _cut_texts(prepared: Prepared, request_id: bytes, ttl_ms: int, result_ttl_s: int, most_rows: int) -> list[Job]:
    options = prepared.options
    some = np.flatnonzero(prepared.plan.counts)
    lengths, texts = prepared.tokens.lengths[some], [str(prepared.inputs[index]) for index in some.tolist()]
    slices = list(_slices(np.cumsum(lengths, dtype=np.int64), MAX_BODY_BYTES - 4 * MAX_INPUTS, most_rows))
    cut_to = options.truncate_prompt_tokens
    return [
        Job(
            request_id=request_id,
            index=index,
            count=len(slices),
            first_input=first,
            ttl_ms=ttl_ms,
            lengths=lengths[first:end],
            texts=tuple(texts[first:end]),
            lane=options.lane,
            options=options.vectors,
            result_ttl_s=result_ttl_s,
            long_inputs=options.long_inputs if cut_to is None else LongInputs.TRUNCATE,
            truncate_to=max(0, cut_to or 0),
            truncation_side=options.truncation_side,
            add_special_tokens=options.add_special_tokens,
            adapter=prepared.adapter,
            prompt_name=prepared.prompt,
        )
        for index, (first, end) in enumerate(slices)
    ]


def _slices(ends: NDArray[np.int64], most: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit one job each, from the running total of their tokens, or of their bytes."""
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        fitting = int(np.searchsorted(ends, before + most, side="right"))
        end = max(first + 1, min(fitting, first + MAX_INPUTS, first + most_rows))
        yield first, end
        first = end
