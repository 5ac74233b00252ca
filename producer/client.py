"""The producer: submit texts or token ids to the queue and await their vectors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.connections import connect_reader
from embedstream.shared.errors import InvalidInput, Unavailable
from embedstream.shared.lanes import Lane

from .admission import ASSUMED_DIMENSION, result_bytes
from .arguments import MAX_RESULT_TTL_S, MAX_TIMEOUT_S, MapOptions, RequestOptions, listed
from .assemble import split_by_input
from .batches import Input, Vector
from .core import NOT_OPEN, Core
from .deliveries import CLAIM_AFTER_S, Delivery, Inbox
from .forwarding import FORWARD_TIMEOUT_S
from .inbox_keys import RowId, check_name
from .mapper import MOST_ITEMS, PATIENCE_S, Mapper
from .mapping import OnFailure, checked, mapped
from .outcomes import counted
from .pickup import read_id
from .request import EmbeddedSlice, Inputs, Options

T = TypeVar("T")


class Producer(Core):
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
            raise Unavailable(NOT_OPEN)
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
