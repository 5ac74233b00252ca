"""POST /pooling: one vector for each input, or one for each of its tokens."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer import Options
from embedstream.producer.fleet import ServedModel
from embedstream.shared.errors import InvalidInput
from embedstream.shared.settings import Settings

from .answering import Answering
from .parsing import refusal
from .responses import POOLING
from .schemas import PoolingRequest

_EMBED, _TOKEN_EMBED = "embed", "token_embed"


class PoolingEndpoint:
    """The endpoint, with what it needs.

    Args:
        answering: the way of a request.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def create(self, request: Request) -> Response:
        """Pool the inputs of a request. What can be refused is refused before anything is queued.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        return await self._answering.respond(request, PoolingRequest, _options, POOLING)


def _options(body: PoolingRequest, served: ServedModel | None, settings: Settings) -> Options:
    """What the producer is to do.

    Args:
        body: of the request.
        served: the model; None while nobody has announced it.
        settings: what becomes of long inputs when the request does not say.

    Raises:
        InvalidInput: the model is not served for the task, or vectors here are never shortened.
    """
    whole = served is None or not served.card.recipe.per_token
    supported = (_EMBED, _TOKEN_EMBED) if whole else (_TOKEN_EMBED,)
    task = supported[0] if body.task is None else body.task
    if task not in supported:
        raise refusal(f"Unsupported task: {task!r} Supported tasks: {supported}", "task", task)
    if body.dimensions is not None:
        raise InvalidInput("dimensions is currently not supported", param="dimensions")
    options = body.options(settings)
    return replace(options, vectors=replace(options.vectors, per_token=task == _TOKEN_EMBED))
