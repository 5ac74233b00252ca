"""The served vectors are sentence-transformers', over real texts, through everything."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embedstream.consumer.model import Model
from embedstream.consumer.pooling import cut_and_normalize, pool
from embedstream.producer import SyncProducer
from embedstream.shared.models import locate
from embedstream.shared.settings import Dtype, Settings

pytestmark = pytest.mark.integration

DATA = Path(__file__).resolve().parents[2] / "bench" / "data"
COUNT = 200


def texts_of(name: str) -> list[str]:
    with gzip.open(DATA / f"{name}.sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(COUNT), strict=False)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return texts_of("passages") + texts_of("queries")


@pytest.fixture(scope="module")
def reference(texts: list[str]) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports, not ours
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(locate("all-MiniLM-L6-v2").path), device="cpu")
    return np.asarray(model.encode(texts, batch_size=32, normalize_embeddings=True), np.float32)


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    left, right = one.astype(np.float64), other.astype(np.float64)
    return np.asarray((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1))


def test_float32_vectors_over_http(serving: Any, texts: list[str], reference: NDArray[np.float32]) -> None:
    vectors = serving.embed(texts, truncate_prompt_tokens=-1)
    assert cosines(vectors, reference).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_float32_vectors_through_the_producer(serving: Any, texts: list[str], reference: NDArray[np.float32]) -> None:
    with SyncProducer(serving.redis_url) as producer:
        vectors = producer.embed(texts, truncate_prompt_tokens=-1)
    assert cosines(vectors, reference).min() >= 0.99999


def test_the_automatic_dtype_keeps_the_meaning(texts: list[str], reference: NDArray[np.float32]) -> None:
    model = Model.load(Settings(dtype=Dtype.AUTO, device="cpu", threads=torch.get_num_threads()))
    tokens = model.tokenizer.encode(texts, truncate_to=model.recipe.max_length)
    order = np.argsort(tokens.lengths, kind="stable")
    vectors = np.empty_like(reference)
    for start in range(0, len(order), 16):
        some = order[start : start + 16]
        ids = np.concatenate([tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in some])
        lengths = tokens.lengths[some]
        pooled = pool(model.recipe.pooling, model.forward(ids, lengths), torch.from_numpy(lengths.astype(np.int64)))
        vectors[some] = cut_and_normalize(pooled, None, True).numpy()
    assert cosines(vectors, reference).min() >= 0.999


def test_company_in_a_batch_changes_nothing(serving: Any, texts: list[str]) -> None:
    together = serving.embed(texts[:64], truncate_prompt_tokens=-1)
    alone = np.concatenate([serving.embed([text], truncate_prompt_tokens=-1) for text in texts[:64:8]])
    assert np.abs(together[::8] - alone).max() < 3e-6


@pytest.fixture(scope="module")
def token_matrices(serving: Any, texts: list[str]) -> Iterator[list[NDArray[np.float32]]]:
    with SyncProducer(serving.redis_url) as producer:
        yield producer.embed_tokens(texts[:20], truncate_prompt_tokens=-1, normalize=False)


def test_token_vectors_average_to_the_vector(
    token_matrices: list[NDArray[np.float32]], reference: NDArray[np.float32]
) -> None:
    means = np.stack([matrix.mean(0) for matrix in token_matrices])
    assert cosines(means, reference[:20]).min() >= 0.99999
