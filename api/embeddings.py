"""POST /v1/embeddings: body -> producer -> response."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer.fleet import ServedModel
from embedstream.shared.errors import NotServed
from embedstream.shared.recipe import Pooling
from embedstream.shared.settings import Settings

from .answering import Answering
from .responses import EMBEDDING
from .schemas import EmbeddingRequest, read


class EmbeddingsEndpoint:
    """The endpoint, with what it needs.

    Args:
        answering: the way of a request.
        settings: what becomes of long inputs.
    """

    def __init__(self, answering: Answering, settings: Settings) -> None:
        self._answering = answering
        self._settings = settings

    async def create(self, request: Request) -> Response:
        """Embed the inputs of a request. What can be refused is refused before anything is queued.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        start_s = time.perf_counter()
        body = await read(request, EmbeddingRequest, self._settings)
        choices = self._answering.choices(request, body)
        served = await self._answering.served(body.model)
        if served is not None:
            _check_pooling(served)
        options = body.options(self._settings)
        prepared = await self._answering.prepare(request, body, served, options, choices)
        return await self._answering.answer(request, body, prepared, choices, EMBEDDING, start_s)


def _check_pooling(served: ServedModel) -> None:
    if served.card.recipe.pooling is Pooling.ALL:
        raise NotServed(
            f"The model does not support Embeddings API: `{served.card.model}` is served with pooling `all`, one "
            "vector for each token. Use /pooling."
        )
