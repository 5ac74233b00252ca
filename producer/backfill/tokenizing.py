"""Tokenising in processes of its own: the event loop and the reading thread keep the interpreter for themselves."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedstream.producer.failures import InputFailure
from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import prepare
from embedstream.producer.request import Options
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import Unavailable
from embedstream.shared.jobs import LongInputs
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger
from embedstream.shared.results import Status
from embedstream.shared.tokenization import TextTokenizer

_MOST_DEATHS = 3
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)
"""What a terminal sends to all of its processes, though it is for the command alone, which ends the others in time."""

_PLACE = re.compile(r"\binput at index \d+")
"""What requests call their inputs; these are of no use to those who look for a row of a file."""

Arguments: TypeAlias = "Queue[tuple[ModelCard, Options]]"

log = get_logger()


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Texts as columns.

    Args:
        ids: (total,) uint16 where the vocabulary fits, else uint32: what travels between processes is half as long.
        lengths: (texts,) uint32; 0 for those that failed.
        cut: (texts,) which of them lost tokens; None for none.
        failures: why some cannot be embedded, by their place; in words for people who sent no request.
        piece_tokens, prompt, adapter: as in `Prepared`.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    lengths: NDArray[np.uint32]
    cut: NDArray[np.bool_] | None
    failures: dict[int, InputFailure]
    piece_tokens: int
    prompt: str
    adapter: str


class Tokenizing:
    """A pool of processes that make token ids as the producer would.

    A process that dies takes nothing with it: the pool is made anew and the texts are tokenised again.

    Args:
        card: of the model.
        options: how the texts are treated.
        processes: at least 1.
    """

    def __init__(self, card: ModelCard, options: Options, processes: int) -> None:
        self._arguments = (card, options)
        self._processes = processes
        self._pool = self._new()

    async def encode(self, texts: pa.LargeStringArray) -> TokenizedTexts:
        """Tokenise (texts,) strings without nulls.

        Raises:
            InvalidInput: what is asked of the model cannot be had, whatever the texts.
            Unavailable: processes die again and again over these texts.
        """
        texts = pa.concat_arrays([texts])  # a slice would take along all that it is a slice of
        for _ in range(_MOST_DEATHS):
            pool = self._pool
            try:
                return await asyncio.wrap_future(_submit(pool, texts))
            except BrokenProcessPool:
                log.warning("backfill.tokenizer_died", texts=len(texts))
                if pool is self._pool:
                    self._pool = self._new()
                    pool.shutdown(wait=False)
        raise Unavailable(f"A process that tokenises died {_MOST_DEATHS} times over the same {len(texts)} texts.")

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def _new(self) -> ProcessPoolExecutor:
        # Not forked: threads of ours hold locks, and a copy of them would never let go.
        context = multiprocessing.get_context("spawn")
        # Not as arguments: those go through a pipe that this process has both ends of, so more than fits there would
        # block the event loop for ever when a process dies before it reads. A queue has a thread that writes.
        arguments: Arguments = context.Queue()
        arguments.cancel_join_thread()
        for _ in range(self._processes):
            arguments.put(self._arguments)
        return ProcessPoolExecutor(self._processes, context, _fetch, (arguments,))


def _submit(pool: ProcessPoolExecutor, texts: pa.LargeStringArray) -> Future[TokenizedTexts]:
    # This starts processes where some are missing. They inherit what is blocked, and so are deaf from the first moment.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINALS)
    try:
        return pool.submit(_encode, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_served: ServedModel
_options: Options


def _fetch(arguments: Arguments) -> None:
    _begin(*arguments.get())


def _begin(card: ModelCard, options: Options) -> None:
    global _served, _options
    _served = ServedModel(Keys("", card.model), (card.model,), card, TextTokenizer(card.tokenizer, card.recipe))
    _options = options
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process waits for work for ever, also when whoever would send it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: pa.LargeStringArray) -> TokenizedTexts:
    prepared = asyncio.run(prepare(texts.to_pylist(), _options, _served))
    tokens = prepared.tokens
    is_cut = _options.truncate_prompt_tokens is not None or _options.long_inputs is not LongInputs.ERROR
    width = np.uint16 if prepared.card is not None and prepared.card.recipe.vocab_size <= 2**16 else np.uint32
    return TokenizedTexts(
        tokens.ids.astype(width),
        tokens.lengths,
        tokens.cut,
        {place: _of_a_text(failure, is_cut=is_cut) for place, failure in prepared.failures.items()},
        prepared.piece_tokens,
        prepared.prompt,
        prepared.adapter,
    )


def _of_a_text(failure: InputFailure, *, is_cut: bool) -> InputFailure:
    if failure.status is not Status.INPUT_TOO_LONG or is_cut:  # there is an end to what is cut, too
        return replace(failure, message=_PLACE.sub("text", failure.message))
    return replace(
        failure,
        message=f"The text is longer than the {_served.card.recipe.max_length:,} tokens that the model reads; "
        "--truncate would cut it, --long-inputs chunk would embed it piece by piece.",
    )
