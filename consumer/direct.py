"""Texts to vectors with a loaded model in this process: by the way that jobs go, without a queue.

For those who ask what a consumer would answer: the diagnosis of a model, and measurements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InvalidInput
from embedstream.shared.jobs import MAX_BODY_BYTES, MAX_INPUTS, Job, LongInputs, text_lengths
from embedstream.shared.keys import FIELD_BODY, FIELD_HEADER
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions
from embedstream.shared.tokenization import offsets

from .batching import in_batches
from .cost import CostModel
from .embedder import Embedder
from .entries import Entry, RawEntry
from .intake import Intake, Refused
from .model import Model
from .outcome import deliver

_LENGTH_BYTES = 4
_TTL_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What a consumer answers to some texts.

    Args:
        vectors: for each text (dim,) or, where tokens' vectors were asked for, (tokens, dim); None where it failed.
        ids: for each text its (tokens,) token ids, after truncation, those of a prompt included.
        reasons: why texts failed, by their place.
    """

    vectors: list[NDArray[Any] | None]
    ids: list[NDArray[np.uint32]]
    reasons: Mapping[int, str]


class Direct:
    """A consumer without a queue. Texts longer than the model reads are cut.

    Args:
        model: loaded and warm.
        budget: highest cost of a micro-batch, in tokens.
    """

    def __init__(self, model: Model, budget: int) -> None:
        self._intake = Intake(model.card, model.tokenizer, "")
        self._embedder = Embedder(model)
        self._budget = budget
        self._costs = CostModel(fills_up=model.fills_up)
        self._per_token = model.recipe.per_token

    def embed(
        self,
        texts: Sequence[str],
        *,
        options: VectorOptions | None = None,
        prompt: str = "",
        adapter: str = "",
        alone: bool = False,
    ) -> Answer:
        """Vectors of texts.

        Args:
            texts: each of at most 256 KiB of UTF-8.
            options: size, normalisation and number format, or vectors of tokens; None for what the model gives.
            prompt: as `Recipe.prompt_of` takes it.
            adapter: of the model; "" for its default.
            alone: whether each text has a forward pass of its own; else they share batches, as the budget allows.

        Raises:
            InvalidInput: the model does not serve what is asked for.
        """
        options = options or VectorOptions(per_token=self._per_token)
        entries = asyncio.run(self._entries(texts, options, prompt, adapter))
        for together in [[entry] for entry in entries] if alone else [entries]:
            for batch in in_batches(together, 1 if alone else self._budget, self._costs):
                deliver(batch, self._embedder.embed(batch), 0.0)
        return _answer(entries, per_token=options.per_token)

    async def _entries(self, texts: Sequence[str], options: VectorOptions, prompt: str, adapter: str) -> list[Entry]:
        entries = []
        for first, some in _slices(texts):
            job = Job(
                *(bytes(16), 0, 1, first, _TTL_MS, text_lengths(some)),
                texts=some,
                options=options,
                long_inputs=LongInputs.TRUNCATE,
                adapter=adapter,
                prompt_name=prompt,
            )
            header, body = job.encode()
            raw = RawEntry(Lane.INTERACTIVE, b"1-0", {FIELD_HEADER: header, FIELD_BODY: body})
            entry = await self._intake.accept(raw, 0.0)
            if isinstance(entry, Refused):
                raise InvalidInput(entry.reason)
            entries.append(entry)
        return entries


def _slices(texts: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Texts that fit one job, each with the place of the first."""
    first = used = 0
    for place, text in enumerate(texts):
        size = len(text.encode()) + _LENGTH_BYTES
        if place > first and (place - first == MAX_INPUTS or used + size > MAX_BODY_BYTES):
            yield first, tuple(texts[first:place])
            first, used = place, 0
        used += size
    yield first, tuple(texts[first:])


def _answer(entries: Sequence[Entry], *, per_token: bool) -> Answer:
    vectors: list[NDArray[Any] | None] = []
    ids: list[NDArray[np.uint32]] = []
    reasons: dict[int, str] = {}
    for entry in entries:
        part = entry.result(bytes(16))
        bounds = offsets(part.rows["vectors"])
        for place, row in enumerate(part.rows):
            if row["message"]:
                reasons[len(vectors)] = part.messages[row["message"] - 1]
            rows = part.vectors[bounds[place] : bounds[place + 1]]
            vectors.append(None if not len(rows) else rows if per_token else rows[0])
        ids += np.split(entry.tokens.ids, entry.tokens.offsets[1:-1])
    return Answer(vectors, ids, reasons)
