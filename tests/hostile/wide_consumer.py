"""A consumer with the real tokenizer and vectors of the real size, but no model.

`python -m tests.hostile.wide_consumer …` answers at once, so that an API process is the slowest part of its deployment.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.outcome import Embedded, RowVectors
from embedstream.consumer.pace import Pace
from embedstream.consumer.service import Served, serve
from embedstream.shared import logs
from embedstream.shared.cards import ModelCard
from embedstream.shared.models import locate
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer, finished, offsets

MODEL = "wide"
DIMENSION = 384
RECIPE = Recipe(max_length=512, pooling=(Pooling.MEAN,), normalize=True, dimension=DIMENSION, vocab_size=30522)
_BUDGET = 16_384


def card(revision: str) -> ModelCard:
    """The card of a revision; the tokenizer is all-MiniLM-L6-v2's."""
    tokenizer = (locate("all-MiniLM-L6-v2").path / "tokenizer.json").read_text()
    return ModelCard(MODEL, RECIPE, finished(tokenizer, do_lower_case=False), revision)


class WideDevice:
    """Gives every row, or every token, some vector."""

    def __init__(self) -> None:
        self._vectors = np.random.default_rng(1).standard_normal((_BUDGET, DIMENSION), np.float32)

    def free(self) -> None:
        """It holds nothing."""

    def embed(self, batch: MicroBatch) -> Embedded:
        """Vectors for every row of the batch."""
        numbers: dict[VectorOptions, int] = {}
        of_entry = [numbers.setdefault(entry.job.options, len(numbers)) for entry in batch.entries]
        of_row = np.array(of_entry)[batch.owner]
        groups = []
        for options, number in numbers.items():
            rows = np.flatnonzero(of_row == number)
            bounds = offsets(batch.lengths[rows]) if options.per_token else None
            size = len(rows) if bounds is None else int(bounds[-1])
            vectors = self._vectors[:size, : options.dimensions].astype(options.dtype.numpy)
            groups.append(RowVectors(rows, vectors, bounds, np.ones(len(rows), np.bool_)))
        return Embedded(groups, 0.001)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--revision", required=True)
    options = parser.parse_args()
    settings = Settings(served_model_name=(MODEL,))
    logs.configure(settings, "consumer")
    made = card(options.revision)
    tokenizer = TextTokenizer(made.tokenizer, made.recipe)
    served = Served(made, tokenizer, WideDevice(), "float32", "wide", Budget(_BUDGET), Pace(_BUDGET))
    asyncio.run(serve(settings, settings.redis_url or "", served, options.name))


if __name__ == "__main__":
    main()
