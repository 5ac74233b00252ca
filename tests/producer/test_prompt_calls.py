"""Prompts and adapters as callers of the producer choose them, in each of its calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedstream.producer import Options, Producer, SyncProducer
from embedstream.producer.arguments import options_of
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import InvalidInput
from embedstream.shared.recipe import NO_PROMPT, ROLE
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

pytestmark = pytest.mark.integration

Starter = Callable[..., Awaitable[Any]]
PROMPTS = {"query": "the queue: ", "passage": "the ", "other": "x"}
ADAPTERS = ("retrieval.query", "retrieval.passage", "sts")
TEXTS = ["queue", "a", ""]


@pytest.fixture
def prompted(card: ModelCard) -> ModelCard:
    recipe = replace(card.recipe, prompts=PROMPTS, default_prompt="other", adapters=ADAPTERS, default_adapter="sts")
    return replace(card, recipe=recipe, fingerprint=b"")


@pytest.fixture
async def stub(start_stub: Starter, prompted: ModelCard) -> Any:
    return await start_stub(prompted)


@pytest.fixture
async def producer(settings: Settings, stub: Any) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        yield producer


def expected(card: ModelCard, name: str, texts: list[str] = TEXTS) -> Any:
    whole = [card.recipe.prompt_text(name) + text for text in texts]
    tokens = TextTokenizer(card.tokenizer, card.recipe).encode(whole)
    sums = [ids.sum() % 977 for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    return np.stack([np.arange(1, 5) * (1.0 + total) for total in sums])


@pytest.mark.parametrize(
    ("options", "prompt", "adapter"),
    [
        ({}, "other", "sts"),
        ({"prompt_name": ""}, "", "sts"),
        ({"prompt_name": "passage"}, "passage", "sts"),
        ({"prompt_name": "", "task": "retrieval.query"}, "", "retrieval.query"),
        ({"input_type": "search_document"}, "passage", "retrieval.passage"),
        ({"input_type": "query", "task": "sts"}, "query", "sts"),
    ],
)
async def test_every_call_takes_them(
    producer: Producer, stub: Any, prompted: ModelCard, options: dict[str, Any], prompt: str, adapter: str
) -> None:
    vectors = expected(prompted, prompt)
    np.testing.assert_allclose(await producer.embed(TEXTS, **options), vectors)
    streamed = [piece async for piece in producer.stream(TEXTS, **options)]
    np.testing.assert_allclose(np.concatenate([piece.vectors for piece in streamed]), vectors)
    np.testing.assert_allclose(await producer.result(await producer.submit(TEXTS, **options)), vectors)
    matrices = await producer.embed_tokens(TEXTS, **options)
    tokens = stub.tokenizer.encode([PROMPTS.get(prompt, "") + text for text in TEXTS])
    assert [len(matrix) for matrix in matrices] == tokens.lengths.tolist()
    assert {(job.prompt_name, job.adapter) for job in stub.seen} == {(prompt, adapter)}
    assert len(stub.seen) == 4


async def test_the_two_sides_of_a_search(producer: Producer, stub: Any, prompted: ModelCard) -> None:
    np.testing.assert_allclose(await producer.embed_query(TEXTS), expected(prompted, "query"))
    np.testing.assert_allclose(await producer.embed_document("a"), expected(prompted, "passage", ["a"]))
    by_ids = await producer.embed_query(TEXTS, task="sts", dtype="float16")
    assert by_ids.dtype == np.float16
    assert [job.adapter for job in stub.seen] == ["retrieval.query", "retrieval.passage", "sts"]


async def test_usage_counts_the_prompt(producer: Producer, stub: Any) -> None:
    for prompt, lengths in ((NO_PROMPT, [3, 3, 2]), ("passage", [4, 4, 3])):
        prepared = await producer.prepare(TEXTS, Options(prompt=prompt))
        assert prepared.least_tokens == sum(lengths)
        assert (await producer.run(prepared)).tokens.tolist() == lengths


async def test_without_an_event_loop(settings: Settings, stub: Any, prompted: ModelCard) -> None:
    def ask() -> None:
        with SyncProducer(settings=settings) as producer:
            np.testing.assert_allclose(producer.embed_query(TEXTS), expected(prompted, "query"))
            np.testing.assert_allclose(producer.embed_document(TEXTS), expected(prompted, "passage"))
            np.testing.assert_allclose(producer.embed(TEXTS, prompt_name=""), expected(prompted, ""))

    await asyncio.to_thread(ask)


async def test_a_model_without_prompts_takes_both_sides_as_they_are(
    settings: Settings, start_stub: Starter, card: ModelCard
) -> None:
    await start_stub(card)
    async with Producer(settings=settings) as producer:
        assert (await producer.embed_query([])).shape == (0, 4)
        plain = await producer.embed(TEXTS)
        assert (await producer.embed_query(TEXTS)).tobytes() == plain.tobytes()
        assert (await producer.embed_document(TEXTS)).tobytes() == plain.tobytes()
        ids = await producer.embed_query([[5, 6]])  # there is nothing to put before them
        assert ids.tobytes() == (await producer.embed([[5, 6]])).tobytes()


async def test_token_ids_get_no_prompt(producer: Producer, stub: Any) -> None:
    await producer.embed([[5, 6]])
    assert stub.seen[-1].ids.tolist() == [5, 6]
    with pytest.raises(InvalidInput, match="`query` cannot be put before token ids"):
        await producer.embed_query([[5, 6]])


async def test_a_new_card_brings_its_own_prompt(
    producer: Producer, stub: Any, start_stub: Starter, prompted: ModelCard
) -> None:
    await producer.embed_query(["a"])
    recipe = replace(prompted.recipe, prompts={"search_query": "queue "}, default_prompt="", adapters=("query",))
    newer = replace(prompted, revision="r2", fingerprint=b"", recipe=replace(recipe, default_adapter=""))
    stub.card = newer  # answers `stale_card` to what was made for the old one
    await start_stub(newer)
    np.testing.assert_allclose(await producer.embed_query(TEXTS), expected(newer, "search_query"))


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"prompt_name": NO_PROMPT}, "No prompt is named '-'", "prompt_name"),
        ({"prompt_name": f"{ROLE}query"}, "none begins with 'role:'", "prompt_name"),
        ({"prompt_name": "", "input_type": "query"}, "give one of them", "input_type"),
        ({"prompt_name": 7}, "prompt_name is 7; a name is a text", "prompt_name"),
        ({"input_type": b"query"}, "input_type is b'query'", "input_type"),
        ({"task": ["sts"]}, r"task is \['sts'\]", "task"),
    ],
)
def test_what_no_name_can_be_is_refused(options: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refusal:
        options_of(**options)
    assert refusal.value.param == param
