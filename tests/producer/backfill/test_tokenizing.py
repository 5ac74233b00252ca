"""Processes that tokenise: the same ids as the producer's, and no text lost when one of them dies."""

from __future__ import annotations

import asyncio
import multiprocessing.spawn
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedstream.producer import Lane, LongInputs, Options
from embedstream.producer.backfill import tokenizing
from embedstream.producer.backfill.tokenizing import Tokenizing
from embedstream.producer.failures import InputFailure
from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import MAX_WHOLE_CHARS, prepare
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import InvalidInput, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.processes import identity_of
from embedstream.shared.results import Status
from embedstream.shared.tokenization import TextTokenizer

OPTIONS = Options(lane=Lane.BULK, partial=True)


@pytest.fixture
def pool(card: ModelCard) -> Iterator[Tokenizing]:
    pool = Tokenizing(card, OPTIONS, 1)
    yield pool
    pool.close()


def array_of(*texts: str) -> Any:
    return pa.array(texts, pa.large_string())


async def test_the_ids_are_those_of_the_producer(pool: Tokenizing, card: ModelCard) -> None:
    texts = ["the queue", "a", "", "long " * 20, "b, c!"]
    served = ServedModel(Keys("p", "m"), ("m",), card, TextTokenizer(card.tokenizer, card.recipe))
    here = await prepare(texts, OPTIONS, served)
    there = await pool.encode(array_of(*texts))
    np.testing.assert_array_equal(there.ids, here.tokens.ids)
    np.testing.assert_array_equal(there.lengths, here.tokens.lengths)
    assert there.ids.dtype == np.uint16
    assert {place: why.status for place, why in there.failures.items()} == {3: Status.INPUT_TOO_LONG}


@pytest.mark.parametrize("how", [LongInputs.TRUNCATE, LongInputs.CHUNK])
async def test_what_is_too_long_even_to_be_cut_is_not_told_to_be_cut(card: ModelCard, how: LongInputs) -> None:
    pool = Tokenizing(card, replace(OPTIONS, long_inputs=how), 1)
    try:
        some = await pool.encode(array_of("a " * (MAX_WHOLE_CHARS // 2 + 1), "b"))
    finally:
        pool.close()
    assert set(some.failures) == {0}
    assert some.failures[0].message.startswith(f"The text has {MAX_WHOLE_CHARS + 2} characters; ")


async def test_failures_speak_of_a_text_and_not_of_a_request(pool: Tokenizing) -> None:
    message = (await pool.encode(array_of("a", "long " * 20, "long " * 2000))).failures[1].message
    assert message.startswith("The text is longer than the 16 tokens that the model reads; --truncate")
    assert "index" not in message
    other = InputFailure(Status.INVALID_INPUT, "The input at index 3 cannot be tokenised: it is odd.")
    assert tokenizing._of_a_text(other, is_cut=False).message == "The text cannot be tokenised: it is odd."


async def test_truncation_and_pieces(card: ModelCard) -> None:
    for long_inputs, length, piece in ((LongInputs.TRUNCATE, 16, 0), (LongInputs.CHUNK, 82, 16)):
        pool = Tokenizing(card, replace(OPTIONS, long_inputs=long_inputs), 1)
        try:
            some = await pool.encode(array_of("a " * 80, "b"))
        finally:
            pool.close()
        assert some.lengths.tolist() == [length, 3]
        assert some.piece_tokens == piece
        assert (None if some.cut is None else some.cut.tolist()) == (None if piece else [True, False])


async def test_what_the_model_does_not_do_is_an_error(card: ModelCard) -> None:
    pool = Tokenizing(card, replace(OPTIONS, prompt="nonsuch"), 1)
    try:
        with pytest.raises(InvalidInput, match="nonsuch"):
            await pool.encode(array_of("a"))
    finally:
        pool.close()


async def test_processes_that_die_as_they_begin_are_told_of(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
    pool = Tokenizing(replace(card, tokenizer=card.tokenizer + " " * 1_000_000), OPTIONS, 2)  # more than a pipe holds
    try:
        with pytest.raises(Unavailable, match="died 3 times"):
            await asyncio.wait_for(pool.encode(array_of("a")), 30)
    finally:
        pool.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
async def test_what_a_terminal_sends_is_not_for_them(card: ModelCard, number: signal.Signals) -> None:
    pool = Tokenizing(card, OPTIONS, 1)
    try:
        beginning = asyncio.create_task(pool.encode(array_of("a")))
        while not pool._pool._processes:
            await asyncio.sleep(0)
        (process,) = pool._pool._processes
        os.kill(process, number)  # as it begins
        await beginning
        os.kill(process, number)  # while it waits for work
        await pool.encode(array_of("b"))
        assert set(pool._pool._processes) == {process}
    finally:
        pool.close()


async def test_a_process_that_dies_is_replaced(pool: Tokenizing, caplog: pytest.LogCaptureFixture) -> None:
    before = await pool.encode(array_of("a"))
    (victim,) = pool._pool._processes
    os.kill(victim, signal.SIGKILL)
    after = await pool.encode(array_of("a"))
    np.testing.assert_array_equal(before.ids, after.ids)
    (other,) = pool._pool._processes
    assert other != victim


async def test_texts_that_kill_are_given_up(pool: Tokenizing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_encode", die)
    with pytest.raises(Unavailable, match="died 3 times over the same 2 texts"):
        await pool.encode(array_of("a", "b"))


async def test_a_slice_travels_without_the_rest(pool: Tokenizing, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    submit = pool._pool.submit

    def weighed(work: Any, texts: Any) -> Any:
        sizes.append(len(pickle.dumps(texts)))
        return submit(work, texts)

    monkeypatch.setattr(pool._pool, "submit", weighed)
    some = await pool.encode(array_of(*["a b c d"] * 10_000).slice(5000, 100))
    assert len(some.lengths) == 100
    assert sizes[0] < 5000


def die(_: Any) -> None:
    os._exit(1)


_PARENT = """
import asyncio, sys, time
import pyarrow as pa
from embedstream.producer import Options
from embedstream.producer.backfill.tokenizing import Tokenizing
from embedstream.shared.cards import ModelCard
from embedstream.shared.recipe import Pooling, Recipe

def main():
    recipe = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=1000)
    pool = Tokenizing(ModelCard("m", recipe, sys.argv[1], "r"), Options(partial=True), 2)
    async def both():
        await asyncio.gather(*(pool.encode(pa.array(["a"] * 50, pa.large_string())) for _ in range(8)))
    asyncio.run(both())
    print(*pool._pool._processes, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


def test_they_end_with_a_parent_that_is_killed(tmp_path: Any, wordpiece_json: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    with subprocess.Popen([sys.executable, str(script), wordpiece_json], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        workers = [identity_of(int(pid)) for pid in line.split()]
        assert workers
        assert all(worker is not None and worker.is_alive for worker in workers)
        parent.kill()
    for _ in range(200):
        if not any(worker is not None and worker.is_alive for worker in workers):
            break
        time.sleep(0.05)
    assert not any(worker is not None and worker.is_alive for worker in workers), "they wait for work for ever"
