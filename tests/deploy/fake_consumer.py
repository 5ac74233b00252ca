"""A consumer without torch: the real loop, and vectors that are a function of the token ids, known to tests.

A text is its token ids in decimal, `17 401 33`. What goes wrong is said by FAKE_* variables; each process leaves its
pid in FAKE_DIR.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.outcome import Embedded, RowVectors
from embedstream.consumer.pace import Pace
from embedstream.consumer.service import Served, new_name, serve
from embedstream.shared import exits, logs
from embedstream.shared.cards import ModelCard
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer, offsets

MODEL = "fake"
DIMENSION = 4
MAX_LENGTH = 32
_WORDS = 2048
_BUDGET = 512
"""Small, so that a job of some parts takes some batches."""


def card() -> ModelCard:
    tokenizer: Tokenizer = Tokenizer(WordLevel({str(number): number for number in range(_WORDS)}, unk_token="0"))  # noqa: S106
    tokenizer.pre_tokenizer = WhitespaceSplit()
    recipe = Recipe(MAX_LENGTH, (Pooling.MEAN,), normalize=False, dimension=DIMENSION, vocab_size=_WORDS)
    # Sorted, so that all processes make one card and one fingerprint.
    return ModelCard(MODEL, recipe, json.dumps(json.loads(tokenizer.to_str()), sort_keys=True), "1")


def vector(text: str) -> NDArray[np.float32]:
    """What a text must become."""
    ids = np.array([int(word) for word in text.split()])
    row: NDArray[np.float32] = _vectors(ids, np.array([len(ids)]))[0]
    return row


def _vectors(ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.float32]:
    sums = np.add.reduceat(ids.astype(np.int64), offsets(lengths)[:-1])
    return np.stack([lengths, sums, ids[offsets(lengths)[:-1]], sums % 7], axis=1).astype(np.float32)


class FakeDevice:
    def free(self) -> None:
        return None

    def embed(self, batch: MicroBatch) -> Embedded:
        time.sleep(float(os.environ.get("FAKE_DELAY_S", "0")))
        vectors = _vectors(batch.ids, batch.lengths)
        some = vectors.astype(batch.entries[0].job.options.dtype.numpy)
        group = RowVectors(np.arange(batch.n_rows), some, None, np.ones(batch.n_rows, np.bool_))
        return Embedded([group], 0.001)


def main() -> int:
    signal.alarm(300)  # even a test that fails leaves none of these behind for long
    settings = Settings()
    logs.configure(settings, "consumer")
    if folder := os.environ.get("FAKE_DIR"):
        (Path(folder) / f"consumer.{os.getpid()}").touch()
    sys.stderr.write("a word from the consumer\n")
    if "FAKE_FINAL" in os.environ:
        exits.complain("the model has its reason")
        return exits.FINAL
    made = card()
    tokenizer = TextTokenizer(made.tokenizer, made.recipe)
    served = Served(made, tokenizer, FakeDevice(), "float32", "fake", Budget(_BUDGET), Pace(_BUDGET))
    asyncio.run(serve(settings, settings.redis_url or "", served, new_name()))
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
