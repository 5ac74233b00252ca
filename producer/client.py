"""The producer: submit texts or token ids to the queue and await their vectors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from redis.exceptions import RedisError

from embedstream.shared.cards import CardCache
from embedstream.shared.connections import COMMAND_TIMEOUT_S, READER_TIMEOUT_S, connect, connect_reader
from embedstream.shared.errors import InvalidInput, ResultTimeout, StaleCard, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.logs import get_logger
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.results import ROW_CONTINUES, ROW_TRUNCATED, ResultPart, Timing
from embedstream.shared.runfile import the_only_live
from embedstream.shared.settings import Settings
from embedstream.shared.urls import without_password

from .enqueue import Writer
from .fleet import Fleet
from .pending import PendingRequest, raise_for_rows
from .prepare import prepare
from .reconcile import Reconciler
from .replies import Replies
from .request import EmbeddedSlice, Embeddings, Inputs, Options, Prepared, cut_into_jobs

log = get_logger()

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class _Session:
    """What one reply stream needs: made when the model, and with it the keys, is known."""

    writer: Writer
    replies: Replies
    lost_contact: asyncio.Event
    tasks: tuple[asyncio.Task[None], ...]


class Producer:
    """Embeds through the queue. Open it once, with `async with`; one is enough for a process.

    It needs no model files: tokenizer and limits come as a card from the consumers.

    Args:
        url: of Redis; None takes the only running `embedstream serve` of this machine.
        model: a served name; None for the only model there is.
        settings: limits and timeouts; None reads the environment.

    Raises:
        ServerNotFound: no URL was given, and none or several servers are running.
    """

    def __init__(self, url: str | None = None, *, model: str | None = None, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        prefix = self._settings.key_prefix
        url = url or self._settings.redis_url
        if url is None:
            server = the_only_live()
            url, prefix = server.redis_url, server.key_prefix
        self._url = url
        self._redis = connect(url)
        self._instance = os.urandom(8).hex()
        self.fleet = Fleet(self._redis, prefix, model, CardCache(self._settings.card_cache_dir), without_password(url))
        """What is known of the consumers, kept fresh in the background."""
        self._sessions: dict[Keys, _Session] = {}  # more than one only after the model on the queue was replaced
        self._opening = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._poll: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Begin to follow the fleet. Redis and the consumers may still be away: requests say so.

        Raises:
            RuntimeError: it was closed before; make a new one.
        """
        if self._stopping.is_set():
            raise RuntimeError("a producer is opened once; make a new one")
        if self._poll is None:
            await self.fleet.refresh()
            self._poll = _start(self.fleet.run(self._stopping), "fleet")

    async def close(self) -> None:
        """Stop, and leave nothing behind in Redis. Requests still under way end with `Unavailable`."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        async with self._opening:  # a session that is just being opened sees the flag, or is closed here
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            for request in session.replies.requests.values():
                request.fail(Unavailable("The producer was closed."))
            session.lost_contact.set()
            session.writer.wake()
            await session.replies.wake()
        tasks = [*([self._poll] if self._poll else []), *(task for session in sessions for task in session.tasks)]
        if tasks:
            # The loops end by themselves. Cancelling a command under way would cost its connection, and redis-py may
            # swallow the cancellation.
            await asyncio.wait(tasks, timeout=READER_TIMEOUT_S + COMMAND_TIMEOUT_S)
        for session in sessions:
            await session.replies.drop()
        await self._redis.aclose()

    async def embed(
        self,
        inputs: str | Inputs,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        dtype: VectorType | str = VectorType.FLOAT32,
        truncate_prompt_tokens: int | None = None,
        add_special_tokens: bool = True,
        lane: Lane | str = Lane.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> NDArray[Any]:
        """One vector for each input.

        Args:
            inputs: texts or token ids; a single text counts as a list of one.
            dimensions: keep this many components (Matryoshka), then normalise; None keeps all.
            normalize: scale to unit length; None does what the model does.
            dtype: number format of the result, also on the queue.
            truncate_prompt_tokens: cut inputs to this many tokens; -1 for the model's limit, None refuses long ones.
            add_special_tokens: for texts: whether the tokenizer adds [CLS] and its like.
            lane: `interactive`, or `bulk` for work that can wait.
            timeout_s: seconds to wait for the result.

        Returns:
            (inputs, dim) of `dtype`, float32 unless asked otherwise.

        Raises:
            InvalidInput: an input cannot be embedded; nothing was queued.
            Overloaded, Unavailable: not accepted; worth a retry later.
            ResultTimeout, JobFailed: accepted, but there is no result.
        """
        vectors = VectorOptions(dimensions, normalize, _choice(VectorType, dtype, "dtype"))
        lane = _choice(Lane, lane, "lane")
        options = Options(vectors, truncate_prompt_tokens, add_special_tokens, lane, timeout_s)
        listed = _listed(inputs)
        if len(listed) == 0:
            recipe = (await self.fleet.live()).card.recipe
            return np.empty((0, dimensions or recipe.dimension), options.vectors.dtype.numpy)
        result = await self.run(await self.prepare(listed, options))
        return result.vectors.copy()  # the buffer of a reply is read-only

    async def embed_tokens(
        self,
        inputs: str | Inputs,
        *,
        normalize: bool | None = None,
        dtype: VectorType | str = VectorType.FLOAT32,
        truncate_prompt_tokens: int | None = None,
        lane: Lane | str = Lane.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[NDArray[Any]]:
        """One vector for each token of each input (late interaction, ColBERT).

        Arguments and errors are those of `embed`.

        Returns:
            For each input (tokens, dim) of `dtype`, special tokens included.
        """
        options = Options(
            VectorOptions(None, normalize, _choice(VectorType, dtype, "dtype"), per_token=True),
            truncate_prompt_tokens,
            lane=_choice(Lane, lane, "lane"),
            timeout_s=timeout_s,
        )
        listed = _listed(inputs)
        if len(listed) == 0:
            return []
        result = await self.run(await self.prepare(listed, options))
        return [matrix.copy() for matrix in np.split(result.vectors, np.cumsum(result.tokens, dtype=np.int64)[:-1])]

    async def stream(
        self,
        inputs: Inputs,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        dtype: VectorType | str = VectorType.FLOAT32,
        truncate_prompt_tokens: int | None = None,
        add_special_tokens: bool = True,
        lane: Lane | str = Lane.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[EmbeddedSlice, None]:
        """The vectors piece by piece, as they finish and not in the order of the inputs.

        Arguments and errors are those of `embed`.

        Yields:
            Slices that together cover every input once.
        """
        vectors = VectorOptions(dimensions, normalize, _choice(VectorType, dtype, "dtype"))
        lane = _choice(Lane, lane, "lane")
        options = Options(vectors, truncate_prompt_tokens, add_special_tokens, lane, timeout_s)
        listed = _listed(inputs)
        if len(listed) == 0:
            return
        prepared = await self.prepare(listed, options)
        deadline_s = self._deadline_s(prepared)
        begun = False
        try:
            async for part in self._parts(prepared, deadline_s):
                raise_for_rows(part)
                begun = True
                yield EmbeddedSlice(part.first_row, part.vectors)
        except StaleCard:
            if begun or not prepared.is_text:
                raise
            async for part in self._parts(await self._prepare_again(prepared), deadline_s):
                raise_for_rows(part)
                yield EmbeddedSlice(part.first_row, part.vectors)

    async def prepare(self, inputs: Inputs, options: Options) -> Prepared:
        """Check and tokenise a request without sending it.

        Raises:
            InvalidInput, NotServed: it cannot be served.
            Unavailable: nobody serves the model now.
        """
        return await prepare(inputs, options, await self.fleet.live())

    async def run(self, prepared: Prepared) -> Embeddings:
        """Send a prepared request and await all of it.

        Raises:
            EmbedstreamError: as `embed` says.
        """
        deadline_s = self._deadline_s(prepared)
        try:
            return await self._collect(prepared, deadline_s)
        except StaleCard:
            if not prepared.is_text:
                raise  # only the caller can make new ids
        return await self._collect(await self._prepare_again(prepared), deadline_s)

    def _deadline_s(self, prepared: Prepared) -> float:
        """When the result is no longer wanted, on the event loop's clock."""
        given_s = prepared.options.timeout_s
        return asyncio.get_running_loop().time() + (self._settings.request_timeout_s if given_s is None else given_s)

    async def _prepare_again(self, prepared: Prepared) -> Prepared:
        """The same request, tokenised for the revision that is served by now."""
        log.info("producer.stale_card", fingerprint=prepared.card.fingerprint.hex())
        await self.fleet.refresh()
        return await self.prepare(prepared.inputs, prepared.options)

    async def _collect(self, prepared: Prepared, deadline_s: float) -> Embeddings:
        parts: list[ResultPart] = []
        async for part in self._parts(prepared, deadline_s):
            raise_for_rows(part)
            parts.append(part)
        parts.sort(key=lambda part: (part.job, part.part))
        rows = np.concatenate([part.rows for part in parts])
        whole = rows[rows["flags"] & ROW_CONTINUES == 0]  # a row that goes on is told again by its last piece
        return Embeddings(
            vectors=parts[0].vectors if len(parts) == 1 else np.concatenate([part.vectors for part in parts]),
            tokens=whole["tokens"],
            truncated=prepared.tokens.truncated + int(np.count_nonzero(whole["flags"] & ROW_TRUNCATED)),
            timing=Timing(
                max(part.timing.queue_us for part in parts),
                max(part.timing.inference_us for part in parts),
                sum(part.timing.compute_tokens for part in parts if part.part == 0),
            ),
        )

    async def _parts(self, prepared: Prepared, deadline_s: float) -> AsyncIterator[ResultPart]:
        session = await self._ready()
        now = asyncio.get_running_loop().time()
        request_id = os.urandom(16)
        jobs = cut_into_jobs(prepared, request_id, max(1, int((deadline_s - now) * 1000)))
        request = PendingRequest(request_id, jobs, now, deadline_s)
        session.replies.requests[request_id] = request
        try:
            session.writer.send(request, request.jobs)
            async for part in request.parts():
                yield part
        finally:
            request.fail(ResultTimeout("Nobody waits for it any more."))  # what has not been sent yet stays here
            del session.replies.requests[request_id]

    async def _ready(self) -> _Session:
        """The session of the model served now; made on the first request."""
        if self._poll is None:
            raise Unavailable("The producer is not open: use `async with Producer(...)`.")
        keys = (self.fleet.served or await self.fleet.live()).keys
        async with self._opening:
            if self._stopping.is_set():
                raise Unavailable("The producer was closed.")
            if keys not in self._sessions:
                self._sessions[keys] = await self._open_session(keys)
            return self._sessions[keys]

    async def _open_session(self, keys: Keys) -> _Session:
        settings = self._settings
        stream = keys.reply(self._instance)
        lost_contact = asyncio.Event()
        writer = Writer(self._redis, keys, stream, settings.max_lane_jobs, lost_contact)
        replies = Replies(self._redis, connect_reader(self._url), stream, settings.reply_ttl_s, lost_contact)
        reconciler = Reconciler(self._redis, keys, writer, replies, settings.reconcile_after_s, lost_contact)
        try:
            await replies.keep_alive()
        except (RedisError, OSError) as error:
            await replies.drop()
            raise Unavailable("Redis cannot be reached.", retry_after_s=2.0) from error
        tasks = (
            _start(replies.run(self._stopping), "replies"),
            _start(writer.run(self._stopping), "enqueue"),
            _start(reconciler.run(self._stopping), "reconcile"),
        )
        return _Session(writer, replies, lost_contact, tasks)


def _listed(inputs: str | Inputs) -> Inputs:
    """A single text is a list of one, and never a sequence of letters; what can only be iterated is gone through."""
    if isinstance(inputs, str):
        return [inputs]
    return inputs if isinstance(inputs, (list, tuple, np.ndarray)) else list(inputs)  # type: ignore[return-value] # same items


def _choice(kind: type[Choice], value: str, param: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise InvalidInput(f"{param} is {value!r}; choose from {', '.join(kind)}.", param=param) from None


def _start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a loop; should it end by an error, say why, for its requests would hang."""
    task = asyncio.create_task(work, name=f"producer-{name}")

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.critical("producer.loop_ended", loop=name, error=repr(task.exception()))

    task.add_done_callback(ended)
    return task
