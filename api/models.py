"""GET /v1/models: what live consumers announce, and clients may ask for."""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer.fleet import Fleet, ServedModel
from embedstream.shared.errors import ModelNotFound

_SHOWN_CHARS = 1_000
"""Of a prompt: instructions with examples may be long."""


class Models:
    """The model list in OpenAI's form, one card for each served name, with fields of our own.

    Args:
        fleet: what is known of the consumers.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._started_s = int(time.time())

    async def list_all(self, request: Request) -> Response:
        """All served names; none before a consumer has announced its model."""
        del request
        served = self._fleet.served
        cards = [self._card(name, served) for name in served.names] if served else []
        return _answer({"object": "list", "data": cards})

    async def retrieve(self, request: Request) -> Response:
        """One served name; it may hold slashes.

        Raises:
            ModelNotFound: nobody serves it.
        """
        name, served = request.path_params["name"], self._fleet.served
        if served is None or name not in served.names:
            raise ModelNotFound(name, known=served.names if served else ())
        return _answer(self._card(name, served))

    def _card(self, name: str, served: ServedModel) -> dict[str, Any]:
        recipe, consumers = served.card.recipe, self._fleet.consumers
        first = consumers[0] if consumers else None
        sizes = recipe.matryoshka_dims
        return {
            "id": name,
            "object": "model",
            "created": int(min((consumer.started_s for consumer in consumers), default=self._started_s)),
            "owned_by": "embedstream",
            "root": served.card.model,
            "parent": None,
            "max_model_len": recipe.max_length,
            "permission": [],
            "dimension": recipe.dimension,
            "token_dimension": recipe.size(per_token=True),
            "pooling": recipe.pooling_name,
            "pooling_source": (first.pooling_source or None) if first else None,
            "head": recipe.head,
            "normalize": recipe.normalize,
            "matryoshka_dimensions": "any" if sizes is None else sizes,
            "similarity": recipe.similarity,
            "prompts": {name: _shortened(text) for name, text in recipe.prompts.items()},
            "default_prompt": recipe.default_prompt or None,
            "tasks": recipe.adapters,
            "default_task": recipe.default_adapter or None,
            "dtype": first.dtype if first else None,
            "revision": served.card.revision,
            "consumers": len(consumers),
        }


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _answer(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
