"""A producer without a queue: real checks and tokens, vectors that follow from the token ids."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Self

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.applications import Starlette
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from embedstream.api import create_app
from embedstream.producer import EmbeddedSlice, Embeddings, InputFailure, Options, Prepared, Producer
from embedstream.producer.fleet import Fleet, ServedModel
from embedstream.producer.prepare import prepare
from embedstream.producer.request import Inputs
from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.errors import Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import Timing
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

DIM = 8
WORDS = ["[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d", "e", "f", "g", "h"]
NAMES = ("tiny", "owner/tiny")
RECIPE = Recipe(
    max_length=10,
    pooling=(Pooling.MEAN,),
    normalize=True,
    dimension=DIM,
    vocab_size=len(WORDS),
    matryoshka_dims=(2, 4),
)


def _tokenizer_json() -> str:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106  # no password
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    text: str = tokenizer.to_str()
    return text


def served_model(recipe: Recipe = RECIPE, names: tuple[str, ...] = NAMES) -> ServedModel:
    card = ModelCard(names[0], recipe, _tokenizer_json(), revision="abc123")
    return ServedModel(Keys("ek", names[0]), names, card, TextTokenizer(card.tokenizer, recipe))


def announcement(consumer: str = "c1", started_s: int = 1_700_000_000) -> Announcement:
    return Announcement(
        consumer,
        NAMES[0],
        NAMES,
        "00" * 16,
        DIM,
        RECIPE.max_length,
        "mean",
        "bfloat16",
        "cpu",
        "abc123",
        started_s,
        pooling_source="modules.json",
    )


def vectors_of(prepared: Prepared) -> NDArray[Any]:
    """(inputs, dim), or (tokens, dim): a function of the ids and the options, rounded as a consumer would round it."""
    assert prepared.card is not None
    options, recipe = prepared.options.vectors, prepared.card.recipe
    pieces = np.split(prepared.tokens.ids.astype(np.float64), prepared.tokens.offsets[1:-1])
    components = np.arange(1, recipe.dimension + 1)
    matrices = [np.sin(np.outer(ids + 1, components)) for ids in pieces]
    if options.per_token:
        rows = np.concatenate(matrices)
    else:  # an input that was refused has no tokens, and a row of zeros
        rows = np.stack([matrix.sum(axis=0) / max(1, len(matrix)) for matrix in matrices])
    rows = rows[:, : options.dimensions or recipe.dimension]
    if recipe.normalize if options.normalize is None else options.normalize:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(norms == 0, 1, norms)
    return rows.astype(np.float32).astype(options.dtype.numpy)


class StubFleet(Fleet):
    """A fleet that knows what the test tells it."""

    def __init__(self) -> None:
        self.redis_ok = True
        self.served = served_model()
        self.consumers = (announcement(),)
        self.reason: str | None = None
        self.load_failure: str | None = None

    @property
    def trouble(self) -> str | None:
        return self.reason

    async def live(self, within_s: float = math.inf) -> ServedModel:
        del within_s
        if self.reason is not None or self.served is None:
            raise Unavailable(self.reason or "No consumer is alive.", retry_after_s=2.0)
        return self.served


class StubProducer(Producer):
    """A producer that computes at once what it is given, or raises what the test says.

    Args:
        fleet: what it says of the consumers.
    """

    def __init__(self, fleet: StubFleet) -> None:
        self.fleet: StubFleet = fleet
        self.error: Exception | None = None
        self.moved_to: ServedModel | None = None
        """The model that is served when the request is run, if another than when it was prepared."""
        self.tokenised: list[int] = []  # inputs of each request that came as far
        self.runs: list[Prepared] = []
        self.spoil: Callable[[NDArray[Any]], NDArray[Any]] = lambda vectors: vectors
        self.failures: dict[int, InputFailure] = {}
        """Inputs that fail alone, at their consumer."""
        self.slice_inputs = 2
        """Inputs of each slice of `in_order`."""
        self.before_slice: Callable[[int], Awaitable[None]] | None = None
        """Called with the place of each slice before it is given: it may wait, or raise."""
        self.called_off = 0
        """How many readers of `in_order` left before its end."""
        self.opened = self.closed = 0

    async def __aenter__(self) -> Self:
        self.opened += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed += 1

    async def prepare(self, inputs: Inputs, options: Options) -> Prepared:
        self.tokenised.append(len(inputs))
        return await prepare(inputs, options, await self.fleet.live())

    async def run(self, prepared: Prepared) -> Embeddings:
        self.runs.append(prepared)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if self.moved_to is not None:
            prepared = await prepare(prepared.inputs, prepared.options, self.moved_to)
        vectors, tokens = self.spoil(vectors_of(prepared)), prepared.tokens.lengths
        failures = {**prepared.failures, **self.failures}
        for index, failure in failures.items():
            if not prepared.options.partial:
                raise failure.error()
            tokens = tokens.copy()
            vectors[index], tokens[index] = 0, 0
        timing = Timing(queue_us=1500, inference_us=2500, compute_tokens=prepared.n_tokens)
        return Embeddings(vectors, tokens, prepared.tokens.truncated, timing, failures)

    async def in_order(self, prepared: Prepared) -> AsyncGenerator[EmbeddedSlice, None]:
        whole = await self.run(prepared)
        rows = np.cumsum(whole.tokens) if prepared.options.vectors.per_token else np.arange(1, len(whole.tokens) + 1)
        starts = [0, *rows.tolist()]
        try:
            for first in range(0, prepared.n_inputs, self.slice_inputs):
                if self.before_slice is not None:
                    await self.before_slice(first)
                end = min(first + self.slice_inputs, prepared.n_inputs)
                yield EmbeddedSlice(
                    first,
                    whole.vectors[starts[first] : starts[end]],
                    whole.tokens[first:end],
                    whole.truncated if first == 0 else 0,
                    whole.timing,
                    {index: failure for index, failure in whole.failures.items() if first <= index < end},
                )
        except GeneratorExit:
            self.called_off += 1
            raise

    def serve(self, **recipe: Any) -> None:
        """Change the served model's recipe."""
        self.fleet.served = served_model(replace(RECIPE, **recipe))


@pytest.fixture
def producer() -> StubProducer:
    return StubProducer(StubFleet())


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def app(settings: Settings, producer: StubProducer) -> Starlette:
    return create_app(settings, producer)


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx2.AsyncClient]:
    async with connect(app) as client:
        yield client


@pytest.fixture
def connect_to() -> Callable[[Starlette], httpx2.AsyncClient]:
    return connect


def connect(app: Starlette) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://embedstream")
