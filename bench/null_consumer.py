"""A consumer whose model costs nothing: what remains is the cost of the pipeline itself.

It has the tokenizer of a real model; the vectors say which row they are of (the first token ids, and the length), so
that a benchmark can still check that each went to the right place.
"""

from __future__ import annotations

import asyncio

import numpy as np

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.outcome import Embedded, RowVectors
from embedstream.consumer.pace import Pace
from embedstream.consumer.service import Served, new_name, serve
from embedstream.shared import logs
from embedstream.shared.cards import ModelCard
from embedstream.shared.models import locate
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer, finished

BUDGET = 65_536


MODEL = "null"
DIMENSION = 384
MARKS = 8
"""Components that say which tokens the row begins with."""


def card() -> ModelCard:
    """The card: all-MiniLM-L6-v2's tokenizer, and vectors of its size."""
    tokenizer = (locate("all-MiniLM-L6-v2").path / "tokenizer.json").read_text()
    recipe = Recipe(max_length=512, pooling=(Pooling.MEAN,), normalize=False, dimension=DIMENSION, vocab_size=30522)
    return ModelCard(MODEL, recipe, finished(tokenizer, do_lower_case=False), "1")


class NullModel:
    """Vectors without a forward pass."""

    def free(self) -> None:
        """It holds nothing."""

    def embed(self, batch: MicroBatch) -> Embedded:
        """(rows, dim): component 0 is the number of tokens, the next ones the first token ids."""
        vectors = np.zeros((batch.n_rows, DIMENSION), np.float32)
        starts = np.cumsum(batch.lengths) - batch.lengths
        vectors[:, 0] = batch.lengths
        for place in range(MARKS):
            has = batch.lengths > place
            vectors[has, place + 1] = batch.ids[starts[has] + place]
        by_options: dict[VectorOptions, list[int]] = {}
        for number, entry in enumerate(batch.entries):
            by_options.setdefault(entry.job.options, []).append(number)
        groups = []
        for options, numbers in by_options.items():
            rows = np.arange(batch.n_rows) if len(by_options) == 1 else np.flatnonzero(np.isin(batch.owner, numbers))
            some = vectors[rows, : options.dimensions].astype(options.dtype.numpy, copy=False)
            groups.append(RowVectors(rows, some, None, np.ones(len(rows), np.bool_)))
        return Embedded(groups, 0.001)


def main() -> None:
    """Serve until SIGTERM; the settings come from the environment."""
    settings = Settings(served_model_name=(MODEL,))
    logs.configure(settings, "consumer")
    made = card()
    tokenizer = TextTokenizer(made.tokenizer, made.recipe)
    served = Served(made, tokenizer, NullModel(), "float32", "null", Budget(BUDGET), Pace(BUDGET))
    asyncio.run(serve(settings, settings.redis_url or "", served, new_name()))


if __name__ == "__main__":
    main()
