"""Probes. They answer from memory, so that a slow Redis or a full queue never makes a probe hang."""

from __future__ import annotations

from functools import cache
from importlib import metadata

import orjson
from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer.fleet import Fleet
from embedstream.shared.errors import Unavailable

_NOT_KEPT = {"cache-control": "no-store"}  # what was true a moment ago is no answer


class Probes:
    """What load balancers and orchestrators ask.

    Args:
        fleet: what is known of Redis and the consumers.
        scale_from_zero_s: how long requests may wait for the first consumer; 0 for not at all.
    """

    def __init__(self, fleet: Fleet, scale_from_zero_s: float = 0.0) -> None:
        self._fleet = fleet
        self._takes_without_consumers = scale_from_zero_s > 0
        _version()  # reads files, which is better done before anybody asks

    async def health(self, request: Request) -> Response:
        """Whether a request would be answered now: a live consumer has the model loaded.

        Raises:
            Unavailable: with the reason, and with that of a consumer which could not load the model.
        """
        del request
        fleet = self._fleet
        if fleet.trouble is not None or fleet.served is None:
            trouble = fleet.trouble or "No consumer has announced a model yet."
            failure = fleet.load_failure if fleet.redis_ok else None
            raise Unavailable(trouble if failure is None else f"{trouble} The last one could not serve: {failure}")
        return _answer(status="ok", model=fleet.served.card.model, consumers=len(fleet.consumers))

    async def live(self, request: Request) -> Response:
        """Whether the process runs, whatever the rest of the world does."""
        del request
        return _answer(status="ok")

    async def ready(self, request: Request) -> Response:
        """Whether requests should be sent here: Redis is reachable, and a consumer is alive or may be waited for.

        Raises:
            Unavailable: with the reason.
        """
        del request
        fleet = self._fleet
        if not fleet.redis_ok or not (fleet.consumers or self._takes_without_consumers):
            raise Unavailable(fleet.trouble or "No consumer is alive.")
        return _answer(status="ok")


async def version(request: Request) -> Response:
    """The version of embedstream."""
    del request
    return _answer(version=_version())


@cache
def _version() -> str:
    return metadata.version("embedstream")


def _answer(**fields: str | int) -> Response:
    return Response(orjson.dumps(fields), headers=_NOT_KEPT, media_type="application/json")
