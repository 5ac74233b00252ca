"""`GET /metrics` in Prometheus's text format, or OpenMetrics for those that ask for it."""

from __future__ import annotations

import asyncio

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from embedstream.shared import metrics


class MetricsEndpoint:
    """The numbers of all processes of a `serve`; of this one alone when it runs by itself."""

    def __init__(self) -> None:
        self._registry = metrics.registry()

    async def show(self, request: Request) -> Response:
        """Print them, in a thread: they may lie in files."""
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # a version that is none, such as `version=x`
            encode, content_type = choose_encoder("")
        body = await asyncio.to_thread(encode, self._registry)
        return Response(body, headers={"content-type": content_type})
