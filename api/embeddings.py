"""POST /v1/embeddings: body -> producer -> response."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer import Embeddings, Prepared, Producer
from embedstream.shared.errors import InvalidInput, ModelNotFound, NotServed, StaleCard, Unavailable
from embedstream.shared.recipe import Pooling
from embedstream.shared.settings import Settings

from . import deadline, responses
from .context import context_of
from .disconnect import unless_hung_up
from .foreign_ids import ForeignIds
from .inputs import Conversations
from .responses import Envelope, Layout
from .schemas import EmbeddingRequest, read

_SHOWN_NAME_CHARS = 200


class EmbeddingsEndpoint:
    """The endpoint, with what it needs.

    Args:
        producer: the open client of the queue.
        settings: limits of a request.
        ids: what reads token ids that are not the model's own; None where clients send the model's.
    """

    def __init__(self, producer: Producer, settings: Settings, ids: ForeignIds | None = None) -> None:
        self._producer = producer
        self._settings = settings
        self._ids = ids

    async def create(self, request: Request) -> Response:
        """Embed the inputs of a request. What can be refused is refused before anything is queued.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        start = time.perf_counter()
        body = await read(request, EmbeddingRequest)
        await self._check_model(body.model)
        self._check_limit("inputs", len(body.prompts), self._settings.max_request_inputs)
        timeout_s = deadline.timeout_s(request.headers, self._settings.request_timeout_s)
        options = replace(body.options(self._settings), timeout_s=timeout_s)
        inputs = body.prompts
        if isinstance(inputs, Conversations):
            raise InvalidInput("`input` is required: this server does not support chat `messages`.", param="messages")
        if self._ids is not None:
            inputs = await self._ids.texts_of(inputs)
        prepared = await self._producer.prepare(inputs, options)
        self._check_limit("tokens", prepared.least_tokens, self._settings.max_request_tokens)

        context = context_of(request.scope)
        context.note(inputs=prepared.n_inputs, tokens=prepared.n_tokens, form=body.encoding_format)
        envelope = Envelope(f"embd-{context.request_id}", int(time.time()), prepared.model, prepared.n_tokens)
        layout = Layout.expected(prepared, body.endianness)
        headers = self._metadata_header(request, body, envelope, layout)
        result = await unless_hung_up(request.receive, self._run(prepared))
        response = await _render(body, (envelope, layout), result, headers)
        response.headers.update(responses.timing_headers(result, time.perf_counter() - start))
        return response

    async def _check_model(self, name: str) -> None:
        """Refuse a model that is not served here, or not for vectors of whole inputs."""
        try:
            served = self._producer.fleet.served or await self._producer.fleet.live()
        except Unavailable:
            names = self._settings.served_names
            if self._settings.scale_from_zero_s == 0:
                raise
            if name and name not in names:  # nobody has announced the model yet; these it will have
                raise ModelNotFound(name[:_SHOWN_NAME_CHARS], known=names) from None
            return
        if name and name not in served.names:
            raise ModelNotFound(name[:_SHOWN_NAME_CHARS], known=served.names)
        if served.card.recipe.pooling is Pooling.ALL:
            raise NotServed(
                f"The model does not support Embeddings API: `{served.card.model}` is served with pooling `all`, one "
                "vector for each token. Use /pooling."
            )

    @staticmethod
    def _check_limit(what: str, count: int, limit: int) -> None:
        if count > limit:
            raise InvalidInput(
                f"A request may have at most {limit} {what} (--max-request-{what}), this one has {count}: "
                "send it in several.",
                param="input",
            )

    def _metadata_header(
        self, request: Request, body: EmbeddingRequest, envelope: Envelope, layout: Layout
    ) -> dict[str, str]:
        """The header of the form `bytes`; made before anything is queued, because it can be too long."""
        if body.encoding_format != "bytes" or request.headers.get("x-metadata", "").lower() == "omit":
            return {}
        header = responses.metadata(envelope, layout)
        limit = self._settings.metadata_limit_bytes
        if len(header) > limit:
            raise InvalidInput(
                f"The `metadata` header for {layout.inputs} inputs has {len(header)} bytes, more than the limit of "
                f"{limit} (--metadata-limit-bytes). Use encoding_format `bytes_only`, or send the request header "
                "`x-metadata: omit`.",
                param="encoding_format",
            )
        return {"metadata": header}

    async def _run(self, prepared: Prepared) -> Embeddings:
        try:
            return await self._producer.run(prepared)
        except StaleCard as error:
            if prepared.is_text:  # tokenised here, and anew already: the client has nothing to mend
                raise Unavailable("The model is just being replaced by another revision.") from error
            raise


async def _render(
    body: EmbeddingRequest, expected: tuple[Envelope, Layout], result: Embeddings, headers: dict[str, str]
) -> Response:
    """The response in the form asked for."""
    # A model replaced while the request was under way may count other tokens, or have another size.
    tokens, dim = int(result.tokens.sum(dtype=np.int64)), result.vectors.shape[1]
    envelope, layout = replace(expected[0], tokens=tokens), replace(expected[1], dim=dim)
    if "metadata" in headers and (envelope, layout) != expected:
        headers = {"metadata": responses.metadata(envelope, layout)}
    if body.encoding_format == "float":
        return await responses.json_response(envelope, responses.float_pieces(result.vectors), headers)
    packed = responses.pack(result.vectors, body.endianness)
    if body.encoding_format == "base64":
        return await responses.json_response(envelope, responses.base64_pieces(packed), headers)
    return responses.bytes_response(packed, headers)
