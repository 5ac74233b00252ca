"""Large texts: tokenised few at a time, and only while somebody waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from embedstream.producer import LongInputs, Options, Producer
from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import AT_ONCE_CHARS, prepare
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import ResultTimeout
from embedstream.shared.keys import Keys
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer, Tokens

LARGE = ["a " * (AT_ONCE_CHARS // 2 + 1)]
CHUNK = Options(long_inputs=LongInputs.CHUNK)
AT_ONCE = 2


class SlowTokenizer(TextTokenizer):
    """Waits for a sign before it tokenises a large text, and notes how many wait at a time."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(card.tokenizer, card.recipe)
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)
        self.running = self.most_running = self.n_begun = 0
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], **options: Any) -> Tokens:
        if len(texts[0]) <= AT_ONCE_CHARS:
            return super().encode(texts, **options)
        with self._counted():
            self.begun.release()
            assert self.go_on.wait(30)
            return super().encode(texts, **options)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.n_begun += 1
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1


@pytest.fixture
def slow(card: ModelCard) -> Iterator[SlowTokenizer]:
    tokenizer = SlowTokenizer(card)
    yield tokenizer
    tokenizer.go_on.set()


async def test_large_texts_wait_for_one_another_and_hold_up_no_others(
    slow: SlowTokenizer, card: ModelCard, keys: Keys
) -> None:
    served = ServedModel(keys, ("m",), card, slow)
    large = [asyncio.create_task(prepare(LARGE, CHUNK, served)) for _ in range(5)]
    for _ in range(AT_ONCE):
        assert await asyncio.to_thread(slow.begun.acquire, timeout=30)
    small = [await prepare(["a " * 10_000], CHUNK, served) for _ in range(5)]
    assert [prepared.n_tokens for prepared in small] == [10_002] * 5
    assert slow.n_begun == AT_ONCE
    slow.go_on.set()
    assert len({prepared.n_tokens for prepared in await asyncio.gather(*large)}) == 1
    assert (slow.n_begun, slow.most_running) == (5, AT_ONCE)


async def test_a_large_text_is_not_tokenised_once_nobody_waits(
    slow: SlowTokenizer, settings: Settings, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Producer(settings=settings) as producer:
        served = replace(await producer.fleet.live(), tokenizer=slow)
        monkeypatch.setattr(type(producer.fleet), "live", _always(served))
        large = [asyncio.create_task(prepare(LARGE, CHUNK, served)) for _ in range(AT_ONCE)]
        for _ in range(AT_ONCE):
            assert await asyncio.to_thread(slow.begun.acquire, timeout=30)
        with pytest.raises(ResultTimeout, match="before its texts were tokenised"):
            await producer.embed(LARGE, long_inputs="chunk", timeout_s=0.05)
        left = asyncio.create_task(producer.embed(LARGE, long_inputs="chunk"))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        slow.go_on.set()
        await asyncio.gather(*large)
        await prepare(LARGE, CHUNK, served)  # after all that came before
        assert slow.n_begun == AT_ONCE + 1


def _always(served: ServedModel) -> Any:
    async def live(*_: Any) -> ServedModel:
        return served

    return live
