"""From the body of a request to its answer: what /v1/embeddings and /pooling do alike."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer import EmbeddedSlice, Embeddings, LongInputs, Options, Prepared, Producer
from embedstream.producer.fleet import ServedModel
from embedstream.shared import metrics
from embedstream.shared.errors import ModelNotFound, StaleCard, Unavailable
from embedstream.shared.results import Timing
from embedstream.shared.settings import Settings

from . import limits, responses
from .chat import rendered
from .choices import Choices
from .context import Context, context_of
from .disconnect import unless_hung_up
from .foreign_ids import ForeignIds
from .inputs import Conversations
from .json_answer import JsonAnswer
from .layout import Envelope, Layout, bounded_metadata
from .prompts import with_prompt_and_adapter
from .quota import Quota
from .responses import Form, Kind
from .schemas import InputRequest, read
from .streaming import Content, PackedVectors, PiecedResponse, Promise, VectorStream
from .turns import Turns

Asked = TypeVar("Asked", bound=InputRequest)

_SHOWN_NAME_CHARS = 200
_WHOLE_JSON_BYTES = 16 * 1024 * 1024
"""Vectors up to this size are awaited before JSON is sent: as its failures have a status, and it a length. More would
take three times as much memory as JSON, for as long as the client reads: a gigabyte for the vectors of all tokens."""


class Answering:
    """The way of a request, with what it needs.

    Args:
        producer: the open client of the queue.
        settings: limits of a request.
        quota: of the caller's key.
        ids: what reads token ids that are not the model's own; None where clients send the model's.
    """

    def __init__(self, producer: Producer, settings: Settings, quota: Quota, ids: ForeignIds | None = None) -> None:
        self._producer = producer
        self._settings = settings
        self._quota = quota
        self._ids = ids
        self._turns = Turns()

    async def respond(
        self,
        request: Request,
        form: type[Asked],
        options_of: Callable[[Asked, ServedModel | None, Settings], Options],
        kind: Kind,
    ) -> Response:
        """Answer a request. What can be refused is refused before anything is queued.

        Args:
            request: whose body has not been read.
            form: of its body.
            options_of: how to treat it, from its body, the model (None while nobody has announced it) and the settings.
            kind: of the answer's items.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        start_s = time.perf_counter()
        body = await read(request, form, self._settings)
        choices = Choices.of(request, body.encoding_format, self._settings.request_timeout_s)
        served = await self.served(body.model)
        options = with_prompt_and_adapter(options_of(body, served, self._settings), body, served)
        prepared = await self._prepare(request, body, served, options, choices)
        return await self._answer(request, body, prepared, choices, kind, start_s)

    async def served(self, name: str) -> ServedModel | None:
        """The model of that name; None while nobody has announced it and requests wait for its first consumer.

        Args:
            name: a served name, or "" for whatever is served.

        Raises:
            ModelNotFound: it is not served here.
            Unavailable: nobody serves it now.
        """
        try:
            served = self._producer.fleet.served or await self._producer.fleet.live()
        except Unavailable:
            names = self._settings.served_names
            if self._settings.scale_from_zero_s == 0:
                raise
            if name and name not in names:  # nobody has announced the model yet; these it will have
                raise ModelNotFound(name[:_SHOWN_NAME_CHARS], known=names) from None
            return None
        if name and name not in served.names:
            raise ModelNotFound(name[:_SHOWN_NAME_CHARS], known=served.names)
        return served

    async def _prepare(
        self, request: Request, body: InputRequest, served: ServedModel | None, options: Options, choices: Choices
    ) -> Prepared:
        """Tokenise and check. What can be refused is refused here, before anything is queued.

        Args:
            request: what came.
            body: of it.
            served: its model.
            options: how to treat it, as far as the body says.
            choices: what the headers say.

        Raises:
            InvalidInput: it cannot be served.
            Unavailable: nobody serves the model now.
            ClientDisconnect: the client hung up.
        """
        limits.check("inputs", len(body.given), self._settings.max_request_inputs)
        options = replace(options, timeout_s=choices.timeout_s, lane=choices.lane, partial=choices.partial)
        if served is not None and isinstance(body.given, Conversations):
            options = replace(options, chat=served.card.chat)
        inputs = await rendered(body, served, self._settings)
        if self._ids is not None:
            inputs = await self._ids.texts_of(inputs)
        limits.refuse_absurd(inputs, options, served, self._settings.max_request_tokens)
        preparing = self._producer.prepare(inputs, options)
        if limits.takes_long(inputs, options, served):
            preparing = unless_hung_up(request.receive, preparing)
        prepared = await preparing
        limits.check("tokens", prepared.least_tokens, self._settings.max_request_tokens)
        context_of(request.scope).note(
            inputs=prepared.n_inputs, tokens=prepared.n_tokens, form=body.encoding_format, lane=choices.lane.value
        )
        return prepared

    async def _answer(
        self, request: Request, body: InputRequest, prepared: Prepared, choices: Choices, kind: Kind, start_s: float
    ) -> Response:
        """Have a request embedded, and answer it in the form it asks for.

        Args:
            request: what came.
            body: of it.
            prepared: ready to be sent.
            choices: what the headers say.
            kind: of the answer's items.
            start_s: when the request was first looked at, on the clock `time.perf_counter`.

        Raises:
            ClientDisconnect: the client hung up.
            RateLimited: the caller's quota is used up.
            EmbedstreamError: there is no result.
        """
        form = Form(
            body.encoding_format,
            body.endianness,
            kind,
            per_token=prepared.options.vectors.per_token,
            least_tokens=0 if prepared.card is None else body.padded_to(prepared.card.recipe),
        )
        context = context_of(request.scope)
        named = request.headers.get("x-request-id") == context.request_id
        name = context.request_id if named or body.request_id is None else body.request_id
        usage = form.usage(prepared.tokens.lengths)
        envelope = Envelope(f"{kind.id_prefix}{name}", int(time.time()), prepared.model, usage)
        layout = Layout(
            prepared.tokens.lengths,
            prepared.dimension or 0,  # of a model that nobody has announced yet the vectors will tell
            prepared.options.vectors.dtype,
            form.endianness,
            form.per_token,
        )
        content = self._json(context, envelope, form, prepared) if form.is_json else PackedVectors()
        in_chunks = request.scope["http_version"] != "1.0"  # which knows none: it would need the length
        whole = form.is_json and (layout.n_bytes <= _WHOLE_JSON_BYTES or not in_chunks)
        stream = None if whole else self._stream(envelope, form, prepared, choices, layout, content, start_s)
        await self._quota.charge(context, prepared.least_tokens)  # all that can be refused for its own sake has been
        if stream is not None:
            return stream
        result = await unless_hung_up(request.receive, self._run(prepared))
        return await _whole(result, content, layout, start_s)

    def _json(self, context: Context, envelope: Envelope, form: Form, prepared: Prepared) -> JsonAnswer:
        return JsonAnswer(envelope, form, context, self._turns, partial=prepared.options.partial)

    def _stream(
        self,
        envelope: Envelope,
        form: Form,
        prepared: Prepared,
        choices: Choices,
        layout: Layout,
        content: Content,
        start_s: float,
    ) -> VectorStream:
        options = prepared.options
        limit, known = self._settings.metadata_limit_bytes, prepared.card is not None
        if choices.with_metadata:  # it may be too long: that is better known before anything is queued
            bounded_metadata(envelope, layout, limit)

        def head(promise: Promise, timing: Timing | None) -> Mapping[str, str]:
            headers = {}
            if choices.with_metadata:
                told = replace(envelope, tokens=form.usage(promise.layout.tokens))
                headers["metadata"] = bounded_metadata(told, promise.layout, limit)
            if timing is not None:
                headers = headers | responses.timing_headers(timing, time.perf_counter() - start_s)
            return headers | _truncation(promise.truncated)

        cuts = options.truncate_prompt_tokens is not None or options.long_inputs is LongInputs.TRUNCATE
        promise = Promise(
            layout,
            known=known,
            exact=choices.with_metadata or (form.per_token and not form.is_json) or (cuts and not known),
            truncated=prepared.tokens.truncated,
        )
        return VectorStream(self._in_order(prepared), promise, head, content)

    async def _run(self, prepared: Prepared) -> Embeddings:
        try:
            return await self._producer.run(prepared)
        except StaleCard as error:
            raise _replaced(prepared, error) from error

    async def _in_order(self, prepared: Prepared) -> AsyncGenerator[EmbeddedSlice, None]:
        try:
            async with aclosing(self._producer.in_order(prepared)) as slices:
                async for piece in slices:
                    yield piece
        except StaleCard as error:
            raise _replaced(prepared, error) from error


def _replaced(prepared: Prepared, error: StaleCard) -> Exception:
    """What to tell of a model that was replaced, and replaced again when the request was sent anew."""
    if prepared.is_text:  # tokenised here: the client has nothing to mend
        return Unavailable("The model is just being replaced by another revision.")
    return error


def _truncation(count: int) -> dict[str, str]:
    """The header that tells how many inputs lost tokens, even if none; and their metric."""
    metrics.TRUNCATED_INPUTS.inc(count)
    return {"x-truncated-inputs": str(count)}


async def _whole(result: Embeddings, content: Content, layout: Layout, start_s: float) -> PiecedResponse:
    piece = EmbeddedSlice(0, result.vectors, result.tokens, failures=result.failures)
    pieces = [content.opening, *[each async for each in content.pieces(piece, layout)], content.closing()]
    headers = responses.timing_headers(result.timing, time.perf_counter() - start_s) | _truncation(result.truncated)
    return PiecedResponse(pieces, headers, content.media_type)
