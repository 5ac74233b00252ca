"""The application: routes, middleware, lifespan and error table in one screen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from embedstream.producer import Producer
from embedstream.shared.settings import Settings

from .embeddings import EmbeddingsEndpoint
from .errors import ErrorBodies, pass_on
from .health import Probes, version
from .metrics import MetricsEndpoint
from .middleware import METRICS_PATH, AccessLog, BodyLimit, Keys, RequestId
from .models import Models


def create_app(settings: Settings, producer: Producer | None = None) -> Starlette:
    """The ASGI application of one API process.

    Args:
        settings: limits, keys, and where the queue is.
        producer: a client of the queue that is not open yet; None makes one. The app opens and closes it.

    Raises:
        ServerNotFound: no Redis URL is set, and none or several servers are running on this machine.
    """
    producer = producer or Producer(settings.redis_url, model=settings.chosen_model, settings=settings)
    embeddings, models, probes = (
        EmbeddingsEndpoint(producer, settings),
        Models(producer.fleet),
        Probes(producer.fleet, settings.scale_from_zero_s),
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with producer:
            yield

    routes = [
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        Route("/v1/models", models.list_all),
        Route("/v1/models/{name:path}", models.retrieve),
        Route("/health", probes.health),
        Route("/ping", probes.health, methods=["GET", "POST"]),
        Route("/livez", probes.live),
        Route("/ready", probes.ready),
        Route("/version", version),
        Route(METRICS_PATH, MetricsEndpoint().show),
    ]
    app = Starlette(
        routes=routes,
        middleware=[  # outermost first
            Middleware(RequestId),
            Middleware(AccessLog, routes),
            Middleware(ErrorBodies),
            Middleware(Keys, settings.api_key, metrics_open=settings.metrics_open),
            Middleware(BodyLimit, settings.payload_limit),
        ],
        exception_handlers={HTTPException: pass_on},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would be an answer without our error body
    return app
