"""POST /v1/embeddings: body -> producer -> response."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer import Options
from embedstream.producer.fleet import ServedModel
from embedstream.shared.errors import NotServed
from embedstream.shared.settings import Settings

from .answering import Answering
from .responses import EMBEDDING
from .schemas import EmbeddingRequest


class EmbeddingsEndpoint:
    """The endpoint, with what it needs.

    Args:
        answering: the way of a request.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def create(self, request: Request) -> Response:
        """Embed the inputs of a request. What can be refused is refused before anything is queued.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        return await self._answering.respond(request, EmbeddingRequest, _options, EMBEDDING)


def _options(body: EmbeddingRequest, served: ServedModel | None, settings: Settings) -> Options:
    """What the producer is to do.

    Raises:
        NotServed: the model makes a vector of each token.
    """
    if served is not None and served.card.recipe.per_token:
        raise NotServed(
            f"The model does not support Embeddings API: `{served.card.model}` is served with pooling `all`, one "
            "vector for each token. Use /pooling."
        )
    return body.options(settings)
