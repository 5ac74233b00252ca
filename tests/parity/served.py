"""The two sides of the matrix: a model in our consumer, and in sentence-transformers one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tests.consumer.made import consumer

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.embedder import Embedder
from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.model import Model
from embedstream.producer import Producer
from embedstream.shared.jobs import Job
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Pooling
from embedstream.shared.settings import Dtype, Settings
from embedstream.shared.tokenization import Tokens

NAME = "m"
Vectors = Sequence[NDArray[np.float32]]


def settings(path: Path) -> Settings:
    """Of a consumer that computes in float32 on one core."""
    return Settings(model=str(path), served_model_name=(NAME,), dtype=Dtype.FLOAT32, device="cpu", threads=1)


def ours(model: Model, texts: Sequence[str], pooling: tuple[Pooling, ...]) -> Vectors:
    """What the consumer makes of some texts, all of them in one batch."""
    tokens = model.tokenizer.encode(texts, truncate_to=model.recipe.max_length)
    return ours_of_tokens(model, tokens, pooling)


def ours_of_tokens(model: Model, tokens: Tokens, pooling: tuple[Pooling, ...]) -> Vectors:
    """What the consumer makes of some token ids, all of them in one batch."""
    model.card = replace(model.card, recipe=replace(model.recipe, pooling=pooling))
    batch = _batch(tokens, VectorOptions(normalize=False, per_token=pooling == (Pooling.ALL,)))
    (group,) = Embedder(model).embed(batch).groups
    return list(group.vectors) if group.bounds is None else np.split(group.vectors, group.bounds[1:-1])


async def through_queue(
    model: Model, texts: Sequence[str], redis_url: str, keys: Keys, input_type: str | None = None
) -> Vectors:
    """What a producer gets for some texts from a consumer of the model."""
    settings = Settings(redis_url=redis_url, key_prefix=keys.prefix, scale_from_zero_s=30)
    async with (
        consumer(redis_url, keys, model.card.tokenizer, Embedder(model), model=model.card),
        Producer(settings=settings, model=NAME) as producer,
    ):
        vectors: NDArray[np.float32] = await producer.embed(texts, long_inputs="truncate", input_type=input_type)
    return list(vectors)


def theirs(model: SentenceTransformer, texts: Sequence[str], value: str = "sentence_embedding") -> Vectors:
    """What sentence-transformers makes of each text by itself."""
    encode: Any = model.encode  # its overloads want the literal values
    return [np.asarray(encode(text, output_value=value, show_progress_bar=False)) for text in texts]


def error(ours: Vectors, theirs: Vectors) -> float:
    """The largest difference, in proportion to what it is a difference of where that is large."""
    pairs = list(zip(ours, theirs, strict=True))
    assert all(one.shape == other.shape and one.dtype == np.float32 for one, other in pairs)
    return max(float(np.abs(one - other).max() / max(1.0, np.abs(other).max())) for one, other in pairs)


def _batch(tokens: Tokens, options: VectorOptions) -> MicroBatch:
    """All rows of one job, however long they are."""
    n_rows = len(tokens)
    job = Job(bytes(16), 0, 1, 0, 60_000, tokens.lengths, ids=tokens.ids, options=options)
    entry = Entry(RawEntry(Lane.INTERACTIVE, b"1-0", {}), job, "", tokens, np.zeros(n_rows, np.bool_))
    owner, row = np.zeros(n_rows, np.int64), np.arange(n_rows)
    return MicroBatch((entry,), owner, row, tokens.ids, tokens.lengths.astype(np.int64))
