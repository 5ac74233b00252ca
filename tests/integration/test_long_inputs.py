"""Long texts in pieces, with the real model: by the caller, by the consumer, and beside others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.producer import LongInputs, Options, Producer
from embedstream.producer.prepare import prepare_texts
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

LIMIT = 256
SHORT, LONG = "a short text", " ".join(f"word{index} and some more of them" for index in range(120))


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray((one.astype(np.float64) * other).sum(-1))


async def test_one_text_has_one_vector(serving: Any) -> None:
    """Alone, among others, or where long inputs are cut into pieces: a text that fits has the same vector."""
    async with Producer(serving.redis_url, settings=Settings()) as producer:
        alone = await producer.embed(SHORT)
        for inputs, policy in (
            ([SHORT, LONG[:900], SHORT], "error"),
            ([SHORT], "chunk"),
            ([LONG, SHORT, LONG], "chunk"),
        ):
            vectors = await producer.embed(inputs, long_inputs=policy)
            place = inputs.index(SHORT)
            np.testing.assert_allclose(vectors[place], alone[0], atol=1e-6)


async def test_the_vector_of_a_long_text(serving: Any) -> None:
    async with Producer(serving.redis_url, settings=Settings()) as producer:
        served = await producer.fleet.live()
        ids = served.tokenizer.encode([LONG]).ids
        assert len(ids) > 3 * LIMIT
        pieces = [ids[start : start + LIMIT] for start in range(0, len(ids), LIMIT)]
        vectors = (await producer.embed(pieces)).astype(np.float64)
        total = (vectors * [[len(piece)] for piece in pieces]).sum(0) / len(ids)
        options = Options(long_inputs=LongInputs.CHUNK)
        result = await producer.run(await producer.prepare([LONG, SHORT], options))
        assert result.tokens[0] == len(ids)
        np.testing.assert_allclose(result.vectors[0], total / np.linalg.norm(total), atol=1e-5)
        raw = await producer.embed(LONG, long_inputs="chunk", normalize=False)
        assert abs(np.linalg.norm(raw[0]) - 1) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_the_consumer_does_it_for_callers_without_a_tokenizer(serving: Any, dtype: str) -> None:
    async with Producer(serving.redis_url, settings=Settings()) as producer:
        by_caller = await producer.embed([LONG, SHORT], long_inputs="chunk", dtype=dtype)
        options = Options(long_inputs=LongInputs.CHUNK)
        prepared = await prepare_texts([LONG, SHORT], options, "all-MiniLM-L6-v2")
        assert prepared.card is None
        by_consumer = await producer.run(prepared)
        assert by_consumer.tokens.tolist() == [len((await producer.fleet.live()).tokenizer.encode([LONG]).ids), 5]
        assert cosines(by_caller.astype(np.float32), by_consumer.vectors).min() > 0.9999
