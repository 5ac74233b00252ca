"""What every client must be able to do, and how it tells what went wrong."""

from __future__ import annotations

import asyncio

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from tests.clients.callers import CALLERS, Ask, Caller
from tests.clients.servers import Server, assert_same

TEXTS = ["the queue", "a vector for each text", "", "ünïcödé 🎉", "two\n\nparagraphs", "a" * 200, "\x00 and \ufffd"]
BATCH = [f"text number {number}, " + "word " * (number % 20) for number in range(130)]  # above what most send at once
every_client = pytest.mark.parametrize("caller", CALLERS, ids=str)


def sent(caller: Caller, text: str) -> str:
    return text if caller.newlines else text.replace("\n", " ")


@every_client
async def test_vectors_are_those_of_plain_http(server: Server, caller: Caller) -> None:
    vectors = await caller.embed(server, TEXTS, Ask())
    assert_same(vectors, server.embed([sent(caller, text) for text in TEXTS]))


@pytest.fixture(scope="module")
def expected_batch(server: Server) -> NDArray[np.float32]:
    return server.embed(BATCH)


@every_client
async def test_batches_keep_their_order(server: Server, caller: Caller, expected_batch: NDArray[np.float32]) -> None:
    assert_same(await caller.embed(server, BATCH, Ask()), expected_batch)


@every_client
async def test_dimensions_shorten_the_vectors(server: Server, caller: Caller) -> None:
    for size in (64, 384):
        vectors = await caller.embed(server, TEXTS[:2], Ask(dimensions=size))
        assert np.shape(vectors) == (2, size)
        assert_same(vectors, server.embed(TEXTS[:2], dimensions=size))


@every_client
async def test_many_at_once_get_their_own(server: Server, caller: Caller) -> None:
    batches = [[f"batch {number}", f"{number} again"] for number in range(24)]
    answers = await asyncio.gather(*(caller.embed(server, batch, Ask()) for batch in batches))
    expected = server.embed([text for batch in batches for text in batch]).reshape(24, 2, -1)
    for vectors, rows in zip(answers, expected, strict=True):
        assert_same(vectors, rows)


@every_client
async def test_a_long_text_is_the_clients_own_error_with_our_words(server: Server, caller: Caller) -> None:
    before = server.answers(400)
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 256 tokens.*truncate_prompt_tokens"):
        await caller.embed(server, ["word " * 400], Ask(retries=2))
    assert server.answers(400) == before + 1  # it would fail again: no client tries


@every_client
async def test_long_texts_are_taken_where_the_server_chunks(cl100k_server: Server, caller: Caller) -> None:
    texts = ["the queue " * 400, "short"]
    assert_same(await caller.embed(cl100k_server, texts, Ask()), cl100k_server.embed(texts))


@every_client
async def test_a_wrong_key_and_a_wrong_model(server: Server, caller: Caller) -> None:
    with pytest.raises(openai.AuthenticationError):
        await caller.embed(server, ["a"], Ask(key="wrong"))
    with pytest.raises(openai.NotFoundError, match="`gpt-9` does not exist"):
        await caller.embed(server, ["a"], Ask(model="gpt-9"))


@every_client
async def test_no_consumer_is_told_as_it_is(lonely_server: Server, caller: Caller) -> None:
    with pytest.raises(openai.APIStatusError, match=r"(?i)no consumer") as caught:
        await caller.embed(lonely_server, ["a"], Ask())
    assert caught.value.status_code == 503


@every_client
async def test_a_spent_quota_is_a_rate_limit(limited_server: Server, caller: Caller) -> None:
    key = f"limited-{caller.name}"
    await caller.embed(limited_server, ["word " * 40], Ask(key=key))  # more than is in hand: what follows must wait
    if not caller.insists:
        with pytest.raises(openai.RateLimitError, match="tokens"):
            await caller.embed(limited_server, ["word"], Ask(key=key))
    if caller.waits:
        refused = limited_server.answers(429)
        vectors = await caller.embed(limited_server, ["word"], Ask(key=key, retries=3))
        assert_same(vectors, limited_server.embed(["word"]))
        assert limited_server.answers(429) == refused + 1  # it waited for as long as it was told, not less


@every_client
async def test_a_client_that_waits_no_longer_gets_an_error(waiting_server: Server, caller: Caller) -> None:
    # Both ends know the deadline, so either may be the first to call it off.
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        await caller.embed(waiting_server, ["a"], Ask(timeout_s=1.0))
