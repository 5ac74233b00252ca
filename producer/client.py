"""The producer: submit texts or token ids to the queue and await their vectors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from embedstream.shared.cards import CardCache
from embedstream.shared.connections import COMMAND_TIMEOUT_S, READER_TIMEOUT_S, connect, connect_reader
from embedstream.shared.errors import InvalidInput, Misconfigured, ResultTimeout, StaleCard, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.logs import get_logger
from embedstream.shared.runfile import the_only_live
from embedstream.shared.settings import LongInputsName, Settings
from embedstream.shared.settings_page import read_environment
from embedstream.shared.urls import REDIS_SCHEMES, without_password

from .admission import ASSUMED_DIMENSION, Undelivered, result_bytes
from .arguments import MAX_RESULT_TTL_S, MAX_TIMEOUT_S, MapOptions, RequestOptions, listed, options_of
from .arrival import end_the_forlorn
from .assemble import split_by_input
from .by_id import RequestsById
from .deliveries import CLAIM_AFTER_S, Delivery, Inbox
from .exchange import Exchange
from .fleet import Fleet
from .forks import watch
from .forwarding import FORWARD_TIMEOUT_S, Forwarding
from .inbox_keys import RowId, check_name
from .mapper import MOST_ITEMS, PATIENCE_S, Input, Mapper, Vector
from .mapping import OnFailure, checked, mapped
from .notices import Notices
from .outcomes import counted
from .pickup import read_id
from .prepare import prepare, prepare_texts
from .request import EmbeddedSlice, Embeddings, Inputs, Options, Prepared
from .sessions import Sessions, start
from .submission import Submissions

log = get_logger()

T = TypeVar("T")
_NOT_OPEN = "The producer is not open: use `async with Producer(...)`."


class Producer:
    """Embeds through the queue. Open it once, with `async with`; one is enough for a process.

    It needs no model files: tokenizer and limits come as a card from the consumers.

    Args:
        url: of Redis; None takes the only running `embedstream serve` of this machine, or the only one with the model.
        model: a served name; None for the only model there is.
        settings: limits and timeouts; None reads the environment.

    Raises:
        ServerNotFound: no URL was given, and none or several servers are running.
        Misconfigured: it is no URL of Redis, or a variable of the environment has a wrong value.
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

    async def embed(
        self,
        inputs: str | Inputs,
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> NDArray[Any]:
        """One vector for each input.

        Args:
            inputs: texts or token ids; a single text counts as a list of one.
            dimensions: keep this many components (Matryoshka), then normalise; None keeps all.
            prompt_name: which of the model's prompts is put before each text; None for its default, if it has one, ""
                for none. Token ids get none: they begin with a prompt already, or go without.
            input_type: what the texts are, instead of a prompt's name: `query`, `document` or what else the model has a
                prompt or an adapter for.
            **options: as `RequestOptions` says.

        Returns:
            (inputs, dim) of `dtype`, float32 unless asked otherwise.

        Raises:
            InvalidInput: an input cannot be embedded; nothing was queued.
            Overloaded, Unavailable: not accepted; worth a retry later.
            ResultTimeout, JobFailed: accepted, but there is no result.
        """
        asked = self._options(dimensions=dimensions, prompt_name=prompt_name, input_type=input_type, **options)
        return await self._embed(inputs, asked)

    async def embed_query(
        self, inputs: str | Inputs, *, dimensions: int | None = None, **options: Unpack[RequestOptions]
    ) -> NDArray[Any]:
        """One vector for each query of a search, as `encode_query` of sentence-transformers gives them.

        Each text gets the prompt that the model has for queries, and the model's adapter for them computes it. A model
        without either makes of a query what `embed` makes of it. Arguments, result and errors are those of `embed`.
        """
        return await self._embed(inputs, self._options(dimensions=dimensions, input_type="query", **options))

    async def embed_document(
        self, inputs: str | Inputs, *, dimensions: int | None = None, **options: Unpack[RequestOptions]
    ) -> NDArray[Any]:
        """One vector for each text that is to be found, as `encode_document` of sentence-transformers gives them.

        What `embed_query` says holds for the prompt and the adapter for documents. That prompt is found under its other
        names too (`passage`, `corpus`, `search_document`), where sentence-transformers would go without.
        """
        return await self._embed(inputs, self._options(dimensions=dimensions, input_type="document", **options))

    async def _embed(self, inputs: str | Inputs, options: Options) -> NDArray[Any]:
        items = listed(inputs)
        if len(items) == 0:
            recipe = (await self.fleet.live(self._timeout_s(options))).card.recipe
            size = options.vectors.dimensions or recipe.size(per_token=False)
            return np.empty((0, size), options.vectors.dtype.numpy)
        result = await self.run(await self.prepare(items, options))
        return result.vectors.copy()  # the buffer of a reply is read-only

    async def embed_tokens(
        self,
        inputs: str | Inputs,
        *,
        prompt_name: str | None = None,
        input_type: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[NDArray[Any]]:
        """One vector for each token of each input (late interaction, ColBERT).

        Arguments and errors are those of `embed`.

        Returns:
            For each input (tokens, dim) of `dtype`, special tokens included.
        """
        asked = self._options(per_token=True, prompt_name=prompt_name, input_type=input_type, **options)
        items = listed(inputs)
        if len(items) == 0:
            return []
        result = await self.run(await self.prepare(items, asked))
        return [matrix.copy() for matrix in split_by_input(result.vectors, result.tokens)]

    async def stream(
        self,
        inputs: Inputs,
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[EmbeddedSlice, None]:
        """The vectors piece by piece, as they finish; in the order of the inputs where some are embedded in pieces.

        Arguments and errors are those of `embed`.

        Yields:
            Slices that together cover every input once.
        """
        asked = self._options(dimensions=dimensions, prompt_name=prompt_name, input_type=input_type, **options)
        items = listed(inputs)
        if len(items) == 0:
            return
        prepared = await self.prepare(items, asked)
        with counted(asked.lane):
            async with aclosing(self._slices(self._exchange.as_they_come, prepared)) as slices:
                async for piece in slices:
                    yield piece

    @overload
    def map(
        self,
        items: AsyncIterable[T] | Iterable[T],
        *,
        text: Callable[[T], Input] | None = None,
        on_failure: Literal["raise"] = "raise",
        **options: Unpack[MapOptions],
    ) -> AsyncGenerator[tuple[T, NDArray[Any]], None]: ...

    @overload
    def map(
        self,
        items: AsyncIterable[T] | Iterable[T],
        *,
        text: Callable[[T], Input] | None = None,
        on_failure: Literal["yield"],
        **options: Unpack[MapOptions],
    ) -> AsyncGenerator[tuple[T, Vector], None]: ...

    def map(
        self,
        items: AsyncIterable[T] | Iterable[T],
        *,
        text: Callable[[T], Input] | None = None,
        on_failure: OnFailure = "raise",
        **options: Unpack[MapOptions],
    ) -> AsyncGenerator[tuple[T, Any], None]:
        """Each item with its vector, for any number of items, of which only few are in memory at a time.

        The source is read as fast as it can be embedded and its reader takes the results, and no faster. What is at
        hand goes at once, so a source that trickles waits for nothing. While the queue is full or nobody answers, it
        waits, and sends again; each item is given once. Closing the generator calls off what is under way.

        An iterable that is not asynchronous is read on the event loop: wrap one that waits for its items.

        Args:
            items: texts, arrays of token ids, or anything that `text` makes these of.
            text: gives what is to be embedded of an item.
            on_failure: `raise` the error of an item that cannot be embedded, or `yield` the item with an
                `InputFailure` in place of its vector, and go on.
            **options: as `MapOptions` says. The lane is bulk unless told otherwise.

        Yields:
            Pairs of an item and its vector, (dim,).

        Raises:
            InvalidInput, NotServed, JobFailed: an item, or all of them, cannot be embedded.
            Overloaded, Unavailable, ResultTimeout: and patience was over.
            StaleCard: the model was replaced, and the items are token ids.
        """
        checked(items, on_failure, options.get("most_items", MOST_ITEMS), options.get("patience_s", PATIENCE_S))
        return mapped(lambda: self.mapper(**options), items, text, on_failure)

    def mapper(
        self,
        *,
        ordered: bool = True,
        most_items: int = MOST_ITEMS,
        patience_s: float = PATIENCE_S,
        lane: Lane | str = Lane.BULK,
        **options: Any,
    ) -> Mapper[Any]:
        """What a map works with, for sources that are read beside the event loop; whoever has it closes it."""
        if not self._tasks:
            raise Unavailable(_NOT_OPEN)
        asked = replace(self._options(lane=lane, **options), partial=True)
        served = self.fleet.served
        dimension = ASSUMED_DIMENSION if served is None else served.card.recipe.size(per_token=False)
        return Mapper(
            self.prepare,
            self.run,
            asked,
            ordered=ordered,
            most_items=most_items,
            # Half of it, for whatever else this process asks for.
            most_rows=max(1, self.max_undelivered_bytes // 2 // result_bytes(asked.vectors, 1, 1, dimension)),
            patience_s=patience_s,
            stopping=self._stopping,
        )

    async def submit(
        self,
        inputs: str | Inputs,
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        per_token: bool = False,
        result_ttl_s: int | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> str:
        """Hand work over without waiting for it: `result` gets the vectors, in this process or another.

        Once it returns, every job is stored in Redis, and from then on the request is as safe as Redis is: what Redis
        loses is not sent again. When it raises `Unavailable` or is cancelled, the jobs may be stored in part; submit
        the same inputs under the same `request_id` then, as often as need be: there is one result.

        Args:
            inputs: as for `embed`.
            dimensions: as for `embed`.
            prompt_name: as for `embed`.
            input_type: as for `embed`.
            per_token: one vector for each token, as `embed_tokens` gives them.
            result_ttl_s: how long the result is kept beyond that; None for the setting.
            request_id: 32 hexadecimal digits of your own, unique for ever; None makes them.
            **options: as `RequestOptions` says.

        Returns:
            The request's id, 32 hexadecimal digits.

        Raises:
            InvalidInput: an input cannot be embedded, or the id stands for something else; nothing was queued.
            Overloaded, ResultTimeout: refused, or its time was over too soon; nothing was queued.
            Unavailable: not confirmed; worth another try under the same id.
        """
        asked = self._options(
            dimensions=dimensions, prompt_name=prompt_name, input_type=input_type, per_token=per_token, **options
        )
        name = os.urandom(16) if request_id is None else read_id(request_id)
        ttl_s = self._settings.result_ttl_s if result_ttl_s is None else result_ttl_s
        if not (isinstance(ttl_s, int) and 1 <= ttl_s <= MAX_RESULT_TTL_S):
            message = f"result_ttl_s is {ttl_s}; it must be a whole number from 1 to {MAX_RESULT_TTL_S}."
            raise InvalidInput(message, param="result_ttl_s")
        prepared = await self.prepare(listed(inputs), asked)
        timeout_s, deadline_s = self._timeout_s(asked), self._deadline_s(prepared)
        with counted(asked.lane, until_result=False):
            await self._by_id.store(prepared, name, timeout_s=timeout_s, result_ttl_s=ttl_s, deadline_s=deadline_s)
        return name.hex()

    async def result(self, request_id: str, *, timeout_s: float | None = None) -> NDArray[Any]:
        """The vectors of a submitted request, as `embed` would have given them. It may be asked for again.

        Args:
            request_id: what `submit` returned, here or in another process.
            timeout_s: how long to wait for it; 0 asks once, None waits as long as the setting `request_timeout_s`.

        Returns:
            (inputs, dim) of the number format that was asked for.

        Raises:
            ResultNotFound: the id is unknown, its result has expired, or it was cancelled.
            ResultTimeout: not complete yet; or, when it says so, nobody embedded it in its time.
            StaleCard: the model was replaced after it had been tokenised; submit it anew.
            JobFailed, InvalidInput, NotServed: there will be no result.
            Unavailable: Redis does not answer.
        """
        result = await self._by_id.pick_up(request_id, self._wait_s(timeout_s))
        if len(result.vectors) != len(result.tokens):
            raise InvalidInput("It was submitted with per_token: use result_tokens().", param="request_id")
        return result.vectors.copy()

    async def result_tokens(self, request_id: str, *, timeout_s: float | None = None) -> list[NDArray[Any]]:
        """The vectors of a request that was submitted with `per_token`, as `embed_tokens` would have given them.

        Arguments and errors are those of `result`.

        Returns:
            For each input (tokens, dim).
        """
        result = await self._by_id.pick_up(request_id, self._wait_s(timeout_s))
        if len(result.vectors) != result.tokens.sum(dtype=np.int64):
            raise InvalidInput("It was submitted without per_token: use result().", param="request_id")
        return [matrix.copy() for matrix in split_by_input(result.vectors, result.tokens)]

    async def cancel(self, request_id: str) -> None:
        """Give a submitted request up: its result is dropped, and what is not computed yet is left undone if possible.

        From then on `result` raises `ResultNotFound` and says that it was cancelled.

        Raises:
            ResultNotFound: the id is unknown, or its result has expired.
            Unavailable: Redis does not answer.
        """
        await self._by_id.cancel(request_id, self._settings.result_ttl_s)

    async def forward(
        self,
        inputs: str | Inputs,
        to: str,
        *,
        tag: str = "",
        ids: Sequence[RowId] | None = None,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> str:
        """Hand work over whose results other processes receive, by `deliveries`, whatever becomes of this one.

        Once it returns, every job is stored in Redis, as `submit` says.

        Args:
            inputs: as for `embed`.
            to: name of the inbox that its receivers share.
            tag: told to the receiver with each result of the request.
            ids: (inputs,) texts or integers, told with the vectors they belong to; None for none.
            dimensions: as for `embed`.
            prompt_name: as for `embed`.
            input_type: as for `embed`.
            request_id: as for `submit`.
            **options: as `RequestOptions` says. The lane is bulk unless told otherwise, and `timeout_s` an hour: what
                is not embedded by then is delivered as a failure.

        Returns:
            The request's id, 32 hexadecimal digits.

        Raises:
            InvalidInput: an input cannot be embedded, or not be forwarded; nothing was queued.
            Overloaded: the queue is full, or the receivers have fallen behind; nothing was queued.
            Unavailable: not confirmed; worth another try under the same id.
        """
        options.setdefault("lane", Lane.BULK)
        options.setdefault("timeout_s", FORWARD_TIMEOUT_S)
        asked = self._options(dimensions=dimensions, prompt_name=prompt_name, input_type=input_type, **options)
        name = os.urandom(16) if request_id is None else read_id(request_id)
        check_name(to)
        prepared = await self.prepare(listed(inputs), asked)
        deadline_s = asyncio.get_running_loop().time() + self._settings.request_timeout_s
        with counted(asked.lane, until_result=False):
            await self._forwarding.forward(
                prepared,
                name,
                to,
                tag,
                ids,
                timeout_s=self._timeout_s(asked),
                ttl_s=self._settings.result_ttl_s,
                deadline_s=deadline_s,
            )
        return name.hex()

    async def deliveries(self, inbox: str, *, claim_after_s: float = CLAIM_AFTER_S) -> AsyncGenerator[Delivery, None]:
        """The results that were forwarded to an inbox, shared by all processes that receive from it.

        Each result is delivered at least once: acknowledge it when what you made of it is safe. What a receiver had
        that died is delivered to another; what one has in hand when it leaves, at once.

        Args:
            inbox: its name.
            claim_after_s: after so long without a sign of life, what a receiver had goes to others. The same for all.

        Yields:
            Deliveries, for ever.

        Raises:
            InvalidInput: the name or the time is none.
            Unavailable: nobody has ever served the model, or Redis is away, at the beginning; or it was closed.
        """
        check_name(inbox)
        if not 0.1 <= claim_after_s <= MAX_TIMEOUT_S:
            raise InvalidInput(
                f"claim_after_s is {claim_after_s}; it must be from 0.1 to {MAX_TIMEOUT_S}.", param="claim_after_s"
            )
        keys = await self._keys()
        receiver = Inbox(
            self._redis,
            connect_reader(self._url),
            keys,
            inbox,
            claim_after_s=claim_after_s,
            ttl_s=self._settings.result_ttl_s,
            stopping=self._stopping,
        )
        self._receivers.add(receiver)
        try:
            async with aclosing(receiver.deliveries()) as deliveries:
                async for delivery in deliveries:
                    yield delivery
        finally:
            self._receivers.discard(receiver)
        raise Unavailable("The producer was closed.")

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
            raise Unavailable(_NOT_OPEN)
        if self.fleet.served is not None:
            return self.fleet.served.keys
        try:
            return (await self.fleet.live()).keys
        except Unavailable:
            if self._waits_for_the_first:
                return Keys(self._prefix, self._text_model)
            raise
