"""What every call of a producer works with: its connections and loops, and requests as they are prepared and run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis

from embedstream.shared.cards import CardCache
from embedstream.shared.connections import COMMAND_TIMEOUT_S, READER_TIMEOUT_S, connect
from embedstream.shared.errors import Misconfigured, ResultTimeout, StaleCard, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger
from embedstream.shared.runfile import the_only_live
from embedstream.shared.settings import LongInputsName, Settings
from embedstream.shared.settings_page import read_environment
from embedstream.shared.urls import REDIS_SCHEMES, without_password

from .admission import Undelivered
from .arguments import options_of
from .arrival import end_the_forlorn
from .by_id import RequestsById
from .deliveries import Inbox
from .exchange import Exchange
from .fleet import Fleet
from .forks import watch
from .forwarding import Forwarding
from .notices import Notices
from .outcomes import counted
from .prepare import prepare, prepare_texts
from .request import EmbeddedSlice, Embeddings, Inputs, Options, Prepared
from .sessions import Sessions, start
from .submission import Submissions

log = get_logger()

NOT_OPEN = "The producer is not open: use `async with Producer(...)`."


class Core:
    """A producer, but for the calls that its users make.

    Arguments are those of `Producer`.
    """

    def __init__(self, url: str | None = None, *, model: str | None = None, settings: Settings | None = None) -> None:
        self._settings = settings or read_environment()
        prefix = self._settings.key_prefix
        url = url or self._settings.redis_url
        if url is None:
            server = the_only_live(model or self._settings.chosen_model)
            url, prefix = server.redis_url, server.key_prefix
        if not url.startswith(REDIS_SCHEMES):  # it may hold a password: not to be repeated
            raise Misconfigured(f"The URL of Redis must begin with one of {', '.join(REDIS_SCHEMES)}.")
        self._prefix = prefix
        self._text_model = model or self._settings.served_names[0]  # whom text jobs are for, before any card is known
        self._redis = connect(url)
        self.fleet = Fleet(
            self._redis,
            prefix,
            model,
            CardCache(self._settings.card_cache_dir),
            without_password(url),
            scale_from_zero_s=self._settings.scale_from_zero_s,
            max_wait_s=self._settings.max_wait_s,
            max_lane_bytes=self._settings.max_lane_bytes,
            bulk_share=self._settings.bulk_share_percent / 100,
        )
        """What is known of the consumers, kept fresh in the background."""
        self._notices = Notices(self._redis)
        self._stopping = asyncio.Event()
        self._sessions = Sessions(
            self._redis,
            url,
            os.urandom(8).hex(),
            self.fleet,
            self._settings.reply_ttl_s,
            self._settings.reconcile_after_s,
            self._stopping,
        )
        self._exchange = Exchange(
            self._keys, self._sessions, Undelivered(self._settings.max_undelivered_bytes), self._notices
        )
        self._submissions = Submissions(self._redis, self.fleet, self._stopping)
        self._by_id = RequestsById(self._redis, self._submissions, self._keys, self._notices, self._stopping)
        self._forwarding = Forwarding(self._redis, self._submissions, self._keys, self._settings.max_undelivered_bytes)
        self._url = url
        self._receivers: set[Inbox] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_inherited = False

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def redis(self) -> Redis:
        """Its client for short commands, for what else a process keeps beside the queue."""
        return self._redis

    @property
    def max_undelivered_bytes(self) -> int:
        """Most bytes of results that may be asked for and not yet read."""
        return self._settings.max_undelivered_bytes

    async def open(self) -> None:
        """Begin to follow the fleet. Redis and the consumers may still be away: requests say so.

        Raises:
            RuntimeError: it was closed before; make a new one.
        """
        self._check_process()
        if self._stopping.is_set():
            raise RuntimeError("a producer is opened once; make a new one")
        if not self._tasks:
            watch(self)
            await self.fleet.refresh()
            self._tasks += [
                start(self.fleet.run(self._stopping), "fleet"),
                start(self._notices.run(self._stopping), "notices"),
            ]
            patience_s = self._settings.scale_from_zero_s
            if patience_s > 0:
                ending = end_the_forlorn(self.fleet, self._sessions.requests, patience_s, self._stopping)
                self._tasks.append(start(ending, "arrival"))

    async def close(self) -> None:
        """Stop, and leave nothing behind in Redis. Requests still under way end with `Unavailable`."""
        if self._stopping.is_set() or self._is_inherited:
            return
        self._stopping.set()
        for receiver in list(self._receivers):
            await receiver.leave()
        loops = await self._sessions.wake()
        self._notices.wake()
        tasks = [*self._tasks, *loops, *self._submissions.wake()]
        if tasks:
            # The loops end by themselves. Cancelling a command under way would cost its connection, and redis-py may
            # swallow the cancellation.
            await asyncio.wait(tasks, timeout=READER_TIMEOUT_S + COMMAND_TIMEOUT_S)
        await self._sessions.drop()
        await self._by_id.join()
        await self._forwarding.join()
        await self._notices.flush()
        await self._redis.aclose()

    def forked(self) -> object:
        """Serve nobody in this process, which is the child of the one that opened it."""
        self._is_inherited = True
        return self

    async def prepare(self, inputs: Inputs, options: Options) -> Prepared:
        """Check and tokenise a request without sending it.

        Raises:
            InvalidInput, NotServed: it cannot be served.
            Unavailable: nobody serves the model now.
            ResultTimeout: its time was over before it was tokenised: large requests wait for one another.
        """
        self._check_process()
        with counted(options.lane, until_result=False):
            arrived_s = asyncio.get_running_loop().time()
            prepared = await self._prepare(inputs, options, self._timeout_s(options))
            return replace(prepared, arrived_s=arrived_s)

    async def _prepare(self, inputs: Inputs, options: Options, within_s: float) -> Prepared:
        deadline_s = asyncio.get_running_loop().time() + within_s
        try:
            served = await self.fleet.live(within_s)
        except Unavailable:
            if not self._waits_for_the_first:
                raise
            if self.fleet.served is None:
                return await prepare_texts(inputs, options, self._text_model)
            served = self.fleet.served
        if options.chat is not None and options.chat != served.card.chat:
            raise Unavailable("The model is just being replaced by one that makes other texts of chat messages.")
        try:
            async with asyncio.timeout_at(deadline_s):
                return await prepare(inputs, options, served)
        except TimeoutError:
            raise ResultTimeout("The request's time was over before its texts were tokenised.") from None

    async def run(self, prepared: Prepared) -> Embeddings:
        """Send a prepared request and await all of it. With `partial` options, inputs that fail alone do not raise.

        Raises:
            EmbedstreamError: as `embed` says.
        """
        deadline_s = self._deadline_s(prepared)
        with counted(prepared.options.lane):
            try:
                return await self._exchange.whole(prepared, deadline_s)
            except StaleCard:
                if not prepared.is_text:
                    raise  # only the caller can make new ids
            return await self._exchange.whole(await self._prepare_again(prepared), deadline_s)

    async def in_order(self, prepared: Prepared) -> AsyncGenerator[EmbeddedSlice, None]:
        """Send a prepared request and give its inputs in their order, each as soon as it and all before it are done.

        What comes out of order is held, and what waits for the reader; `embedstream_held_result_bytes` counts it. A
        reader that leaves calls off what is not computed yet.

        Yields:
            Slices that follow one another without a gap and together cover every input once.

        Raises:
            EmbedstreamError: as `embed` says; it may come after the first slice.
        """
        with counted(prepared.options.lane):
            async with aclosing(self._slices(self._exchange.in_order, prepared)) as slices:
                async for piece in slices:
                    yield piece

    async def _slices(
        self, give: Callable[[Prepared, float], AsyncGenerator[EmbeddedSlice, None]], prepared: Prepared
    ) -> AsyncGenerator[EmbeddedSlice, None]:
        """What `give` makes of a request; should the model be replaced before the first slice, of the one made anew."""
        deadline_s, begun = self._deadline_s(prepared), False
        try:
            async with aclosing(give(prepared, deadline_s)) as slices:
                async for piece in slices:
                    begun = True
                    yield piece
        except StaleCard:
            if begun or not prepared.is_text:
                raise  # only the caller can make new ids
            async with aclosing(give(await self._prepare_again(prepared), deadline_s)) as slices:
                async for piece in slices:
                    yield piece

    def _check_process(self) -> None:
        if self._is_inherited:
            raise RuntimeError(
                "This producer was opened before the process was forked, and its connections are the other process's: "
                "make a new one here, with `async with Producer(...)`. A SyncProducer opens itself anew."
            )

    def _options(self, *, long_inputs: LongInputsName | str | None = None, **others: Any) -> Options:
        self._check_process()
        policy = self._settings.long_inputs_policy if long_inputs is None else long_inputs
        return options_of(long_inputs=policy, **others)

    def _wait_s(self, timeout_s: float | None) -> float:
        return self._settings.request_timeout_s if timeout_s is None else timeout_s

    def _timeout_s(self, options: Options) -> float:
        return self._wait_s(options.timeout_s)

    def _deadline_s(self, prepared: Prepared) -> float:
        """When the result is no longer wanted, on the event loop's clock."""
        since_s = asyncio.get_running_loop().time() if prepared.arrived_s is None else prepared.arrived_s
        return since_s + self._timeout_s(prepared.options)

    async def _prepare_again(self, prepared: Prepared) -> Prepared:
        """The same request, tokenised for the revision that is served by now."""
        log.info("producer.stale_card", model=prepared.model)
        loop, deadline_s = asyncio.get_running_loop(), self._deadline_s(prepared)
        await self.fleet.refresh_within(deadline_s - loop.time())
        again = await self._prepare(prepared.inputs, prepared.options, deadline_s - loop.time())
        return replace(again, arrived_s=prepared.arrived_s)

    @property
    def _waits_for_the_first(self) -> bool:
        """Whether requests may be queued for a model that nobody has announced yet."""
        return self._settings.scale_from_zero_s > 0 and self.fleet.redis_ok and self.fleet.unannounced

    async def _keys(self) -> Keys:
        """The keys of the model served now."""
        self._check_process()
        if not self._tasks:
            raise Unavailable(NOT_OPEN)
        if self.fleet.served is not None:
            return self.fleet.served.keys
        try:
            return (await self.fleet.live()).keys
        except Unavailable:
            if self._waits_for_the_first:
                return Keys(self._prefix, self._text_model)
            raise
