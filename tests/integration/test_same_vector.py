"""One text has one vector: alone, among others, over HTTP in every form, by the producer, as text, in chunk mode."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.consumer.made import consumer
from tests.contract.models import MODELS
from tests.contract.models import write as write_layers
from tests.parity.families import FAMILIES
from tests.parity.layout import write as write_family

from embedstream.api import create_app
from embedstream.consumer.agreement import SAME, agreement
from embedstream.consumer.embedder import Embedder
from embedstream.consumer.model import Model
from embedstream.producer import Lane, LongInputs, Options, Producer
from embedstream.producer.prepare import prepare_texts
from embedstream.shared.jobs import MAX_INPUTS
from embedstream.shared.keys import Keys
from embedstream.shared.settings import Dtype, Settings

pytestmark = pytest.mark.integration

N_OTHERS = 64
ONE_DIRECTION = 1 - 1e-9

Matrix = NDArray[np.float32]


def sized(*counts: int) -> list[str]:
    """Texts of so many words: in all models here a word of one letter is a token or two."""
    return [" ".join("abcdefgh"[(place * place + count) % 8] for place in range(count)) for count in counts]


class Ways:
    """All ways to a vector of one deployment.

    Args:
        http: client of the API.
        producer: open.
        model: its served name.
    """

    def __init__(self, http: httpx2.AsyncClient, producer: Producer, model: str) -> None:
        self._http = http
        self._producer = producer
        self._model = model

    async def post(self, inputs: Any, encoding: str = "float") -> Matrix:
        """POST /v1/embeddings in one of the forms."""
        body = {"input": inputs, "encoding_format": encoding}
        response = await self._http.post("/v1/embeddings", json=body, timeout=120)
        assert response.status_code == 200, response.text
        if encoding.startswith("bytes"):
            n_rows = 1 if isinstance(inputs, str) else len(inputs)
            return np.frombuffer(response.content, "<f4").reshape(n_rows, -1)
        rows = [item["embedding"] for item in json.loads(response.content)["data"]]
        if encoding == "base64":
            return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
        return np.array(rows, np.float32)

    async def among(self, texts: list[str], others: list[str]) -> Matrix:
        """The texts' vectors from one request in which they stand between the others."""
        inputs = [*texts, *others]
        order = random.Random(0).sample(range(len(inputs)), len(inputs))
        vectors = await self.post([inputs[place] for place in order])
        return vectors[np.argsort(order)][: len(texts)]

    async def as_texts(self, texts: list[str], options: Options) -> Matrix:
        """By jobs whose texts the consumer tokenises."""
        prepared = await prepare_texts(texts, options, self._model)
        assert prepared.card is None
        vectors: Matrix = (await self._producer.run(prepared)).vectors
        return vectors

    async def all_of(self, texts: list[str], others: list[str]) -> dict[str, Matrix]:
        """The texts' vectors by every way."""
        producer = self._producer
        tokens = (await producer.fleet.live()).tokenizer.encode(texts)
        ids = [row.tolist() for row in np.split(tokens.ids, tokens.offsets[1:-1])]
        chunked = Options(long_inputs=LongInputs.CHUNK)
        whole = Options(long_inputs=LongInputs.ERROR)
        bulk, *at_once = await asyncio.gather(
            producer.embed([*texts, *others], lane=Lane.BULK), *(self.post(text) for text in [*texts, *others[::4]])
        )
        prepared = await producer.prepare([*texts, *others], whole)
        slices = [piece.vectors async for piece in producer.in_order(prepared)]
        return {
            "together": await self.post(texts),
            "among 64 others": await self.among(texts, others),
            "at once with others": np.concatenate(at_once[: len(texts)]),
            "base64": await self.post(texts, "base64"),
            "bytes": await self.post(texts, "bytes"),
            "bytes_only": await self.post(texts, "bytes_only"),
            "token ids": await self.post(ids),
            "producer, alone": np.concatenate([await producer.embed(text) for text in texts]),
            "producer, among others": (await producer.embed([*others, *texts]))[len(others) :],
            "producer, slices": np.concatenate(slices)[: len(texts)],
            "bulk": bulk[: len(texts)],
            "text jobs": await self.as_texts([*texts, *others], whole),
            "text jobs, one each": np.concatenate([await self.as_texts([text], whole) for text in texts]),
            "chunk mode": await producer.embed(texts, long_inputs="chunk"),
            "chunk mode, text jobs": await self.as_texts([*texts, *others], chunked),
        }

    async def check(self, texts: list[str], others: list[str]) -> None:
        """Compare every way with each text asked for alone."""
        assert len(others) == N_OTHERS > MAX_INPUTS - 1
        alone = np.concatenate([await self.post(text) for text in texts])
        assert agreement(list(alone[:-1]), list(alone[1:])).cosine < 0.99  # they are different texts
        for way, vectors in (await self.all_of(texts, others)).items():
            found = agreement(list(vectors[: len(texts)]), list(alone))
            assert found.error <= SAME, (way, texts[found.at][:40], found)
            assert found.cosine >= ONE_DIRECTION, (way, found)


async def test_the_real_model(serving: Any) -> None:
    texts = ["a short text", "", "naïve 東京 🙂", *sized(5, 100, 254)]
    settings = Settings(redis_url=serving.redis_url)
    async with (
        httpx2.AsyncClient(base_url=serving.url) as http,
        Producer(settings=settings) as producer,
    ):
        await Ways(http, producer, "all-MiniLM-L6-v2").check(texts, sized(*[*range(1, 17)] * 4)[1:] + sized(254))


@asynccontextmanager
async def deployed(path: Path, redis_url: str, keys: Keys, prefix: str) -> AsyncIterator[Ways]:
    """A model of a folder behind a real queue, consumer and API all in this process."""
    served = Settings(model=str(path), served_model_name=("m",), dtype=Dtype.FLOAT32, device="cpu", threads=1)
    model = await asyncio.to_thread(Model.load, served)
    settings = Settings(redis_url=redis_url, key_prefix=prefix, model="m", scale_from_zero_s=30)
    async with consumer(redis_url, keys, model.card.tokenizer, Embedder(model), model=model.card):
        producer = Producer(settings=settings, model="m")
        app = create_app(settings, producer)
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            yield Ways(http, producer, "m")


def decoder(folder: Path) -> Path:
    """Qwen2, pooled by its last token."""
    (family,) = [family for family in FAMILIES if family.name == "Qwen2"]
    path = write_family(family, folder)
    pooling = path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"embedding_dimension": family.dimension, "pooling_mode": "lasttoken"}))
    return path


@pytest.mark.parametrize("kind", ["decoder", "layers"])
async def test_a_tiny_model(
    kind: str, redis_url: str, keys: Keys, prefix: str, tmp_path: Path, wordpiece_json: str
) -> None:
    torch.set_num_threads(1)
    path = decoder(tmp_path) if kind == "decoder" else write_layers(MODELS["headed"], wordpiece_json, tmp_path)
    async with deployed(path, redis_url, keys, prefix) as ways:
        await ways.check(["the queue", "x", *sized(2, 7, 20)], sized(*range(1, 23), *range(1, 22), *range(1, 22)))
