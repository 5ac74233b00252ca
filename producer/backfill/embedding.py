"""Windows to vectors: unique texts, tokenised in processes, sorted by length, sent as requests on the bulk lane."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedstream.producer.client import Producer
from embedstream.producer.credit import REQUEST_TOKENS, Credit
from embedstream.producer.failures import InputFailure
from embedstream.producer.request import Embeddings, Options, Prepared
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import Overloaded, ResultTimeout, Unavailable
from embedstream.shared.logs import get_logger
from embedstream.shared.tokenization import Tokens, offsets

from .progress import Progress
from .tokenizing import TokenizedTexts, Tokenizing
from .unique import Computed, Seen

SLICE_TEXTS = 2048
"""Texts that are tokenised in one go."""
REQUEST_TEXTS = 512
"""Of one request: eight jobs of short texts, and an answer of about a megabyte."""
_PAUSE_S = 2.0
_MOST_TIMEOUTS = 3

log = get_logger()


@dataclass(frozen=True, slots=True)
class WindowVectors:
    """What became of the texts of a window.

    Args:
        vectors: (texts, dim) in the number format asked for; zero for a text that failed.
        failures: why texts have none, by their place.
        texts: unique texts that were computed for it.
        tokens: of those.
    """

    vectors: NDArray[Any]
    failures: dict[int, InputFailure]
    texts: int
    tokens: int


class Embedding:
    """Embeds windows; several may be under way.

    Args:
        producer: open.
        card: of the model; a consumer with another one is an error.
        options: of the requests.
        tokenizing: makes ids.
        credit: bounds what is under way.
        progress: told of every answer.
        patience_s: how long to wait for a consumer or for Redis.
    """

    def __init__(
        self,
        producer: Producer,
        card: ModelCard,
        options: Options,
        tokenizing: Tokenizing,
        credit: Credit,
        progress: Progress,
        patience_s: float,
    ) -> None:
        self._producer = producer
        self._card = card
        self._options = options
        self._tokenizing = tokenizing
        self._credit = credit
        self._progress = progress
        self._patience_s = patience_s
        self._seen = Seen()
        self._dimension = options.vectors.dimensions or card.recipe.size(per_token=False)

    async def embed(self, texts: pa.ChunkedArray) -> WindowVectors:
        """Embed (texts,) large strings without nulls.

        Raises:
            StaleCard: the model was replaced.
            Unavailable: no consumer, or no Redis, for longer than the patience allows.
        """
        encoded = await asyncio.to_thread(_unique, texts)
        unique, indices = encoded.dictionary, np.asarray(encoded.indices)
        places = self._seen.find(unique)
        new = np.flatnonzero(places.owner < 0)
        own = Computed(
            unique if len(new) == len(unique) else unique.take(pa.array(new)),
            np.zeros((len(new), self._dimension), self._options.vectors.dtype.numpy),
        )
        self._seen.remember(own)
        counts = np.bincount(indices, minlength=len(unique))
        try:
            tokens = await self._compute(own, counts[new])
        except BaseException as error:
            if not own.done.done():
                own.done.set_exception(error if isinstance(error, Exception) else Unavailable("It was given up."))
                own.done.exception()  # whoever shares its texts is told; nobody else needs to be
            raise
        own.done.set_result(None)
        self._progress.computed(int(len(indices) - counts[new].sum()), 0, 0)
        sources = [(own, new, np.arange(len(new)))]
        for number, owner in enumerate(places.owners):
            mine = np.flatnonzero(places.owner == number)
            if len(mine):
                await asyncio.shield(owner.done)
                sources.append((owner, mine, places.place[mine]))
        vectors, failures = await asyncio.to_thread(_gather, sources, indices, len(unique))
        return WindowVectors(vectors, failures, len(new), tokens)

    async def _compute(self, own: Computed, counts: NDArray[np.int64]) -> int:
        """Fill in the vectors of new texts; `counts` says how many rows each stands for. Returns their tokens."""
        if not len(own.texts):
            return 0
        slices = [
            self._tokenizing.encode(own.texts.slice(first, SLICE_TEXTS))
            for first in range(0, len(own.texts), SLICE_TEXTS)
        ]
        tokenized = await asyncio.gather(*slices)
        for number, some in enumerate(tokenized):
            own.failures.update({number * SLICE_TEXTS + place: why for place, why in some.failures.items()})
        lengths = np.concatenate([some.lengths for some in tokenized])
        ids = np.concatenate([some.ids for some in tokenized])
        lost = _joined_cut(tokenized)
        # The shortest first: a consumer forms batches from the short rows up, and the oldest row goes along. Were that
        # one of the longest that it has, it would often go nearly alone.
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        bounds = offsets(lengths)
        async with asyncio.TaskGroup() as group:
            for chosen in _requests(lengths, order):
                rows = [ids[bounds[place] : bounds[place + 1]] for place in chosen.tolist()]
                tokens = Tokens(
                    np.concatenate(rows).astype(np.uint32), lengths[chosen], None if lost is None else lost[chosen]
                )
                prepared = Prepared(
                    self._card,
                    (),
                    tokens,
                    self._options,
                    piece_tokens=tokenized[0].piece_tokens,
                    prompt=tokenized[0].prompt,
                    adapter=tokenized[0].adapter,
                )
                group.create_task(self._send(own, chosen, prepared, int(counts[chosen].sum())))
        return int(lengths.sum(dtype=np.int64))

    async def _send(self, own: Computed, places: NDArray[np.int64], prepared: Prepared, n_rows: int) -> None:
        """One request, until it is answered."""
        async with self._credit.of(prepared.n_tokens, prepared.n_inputs):
            result = await self._answer(prepared)
        own.vectors[places] = result.vectors
        own.failures.update({int(places[place]): why for place, why in result.failures.items()})
        self._progress.computed(n_rows, len(places), prepared.n_tokens)

    async def _answer(self, prepared: Prepared) -> Embeddings:
        """The answer to a request, asked for again while there is hope; a result is seen once, whatever was sent."""
        loop = asyncio.get_running_loop()
        last_good_s, timeouts = loop.time(), 0
        while True:
            try:
                result = await self._producer.run(prepared)
            except Overloaded as error:
                self._credit.refused()
                pause_s, why, last_good_s = error.retry_after_s, "the queue is full", loop.time()
            except Unavailable as error:
                if loop.time() - last_good_s > self._patience_s:
                    raise
                pause_s, why = _PAUSE_S, str(error)
            except ResultTimeout as error:
                timeouts += 1
                if timeouts == _MOST_TIMEOUTS:
                    raise
                pause_s, why = 0.0, str(error)
            else:
                self._progress.state = ""
                return result
            self._progress.state = f"waiting: {why}"
            await asyncio.sleep(pause_s)


def _unique(texts: pa.ChunkedArray) -> pa.DictionaryArray:
    return texts.combine_chunks().dictionary_encode() if texts.num_chunks != 1 else texts.chunk(0).dictionary_encode()


def _joined_cut(tokenized: list[TokenizedTexts]) -> NDArray[np.bool_] | None:
    if all(some.cut is None for some in tokenized):
        return None
    return np.concatenate(
        [np.zeros(len(some.lengths), np.bool_) if some.cut is None else some.cut for some in tokenized]
    )


def _requests(lengths: NDArray[np.uint32], order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Places in the given order, cut into requests."""
    ends = np.cumsum(lengths[order], dtype=np.int64)
    first = 0
    while first < len(order):
        before = int(ends[first - 1]) if first else 0
        fitting = int(np.searchsorted(ends, before + REQUEST_TOKENS, side="right"))
        end = max(first + 1, min(fitting, first + REQUEST_TEXTS))
        yield order[first:end]
        first = end


def _gather(
    sources: list[tuple[Computed, NDArray[np.int64], NDArray[np.int64]]], indices: NDArray[np.int64], n_unique: int
) -> tuple[NDArray[Any], dict[int, InputFailure]]:
    """(rows, dim) vectors of all rows, from those of the unique texts, and why rows have none."""
    own = sources[0][0]
    if len(own.vectors) == n_unique:
        vectors = own.vectors
    else:
        vectors = np.empty((n_unique, own.vectors.shape[1]), own.vectors.dtype)
        for owner, mine, place in sources:
            vectors[mine] = owner.vectors[place]
    reasons: dict[int, InputFailure] = {}
    for owner, mine, place in sources:
        if owner.failures:
            reasons |= {
                int(number): owner.failures[int(there)]
                for number, there in zip(mine, place, strict=True)
                if int(there) in owner.failures
            }
    if not reasons:
        return vectors[indices], {}
    failed = np.isin(indices, list(reasons))
    return vectors[indices], {int(row): reasons[int(indices[row])] for row in np.flatnonzero(failed)}
