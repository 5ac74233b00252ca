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

from .answering import Answering
from .bodies import BodyLimit
from .cors import Cors
from .description import Description
from .embeddings import EmbeddingsEndpoint
from .errors import ErrorBodies, pass_on
from .foreign_ids import reader_of
from .health import Probes, version
from .keys import METRICS_PATH, KeyRing, Keys
from .metrics import MetricsEndpoint
from .middleware import AccessLog, RequestId
from .models import Models
from .pooling import PoolingEndpoint
from .quota import Quota, Settlement
from .tokenize import Tokenizing


def create_app(settings: Settings, producer: Producer | None = None) -> Starlette:
    """The ASGI application of one API process.

    Args:
        settings: limits, keys, and where the queue is.
        producer: a client of the queue that is not open yet; None makes one. The app opens and closes it.

    Raises:
        Misconfigured: a setting names something that is not there.
        ServerNotFound: no Redis URL is set, and none or several servers are running on this machine.
    """
    ring = KeyRing(settings.api_key, settings.api_keys_file)
    producer = producer or Producer(settings.redis_url, model=settings.chosen_model, settings=settings)
    quota = Quota(producer, settings)
    answering = Answering(producer, settings, quota, reader_of(settings))
    embeddings, pooling, tokenizing, models, probes, description = (
        EmbeddingsEndpoint(answering),
        PoolingEndpoint(answering),
        Tokenizing(answering, settings),
        Models(producer.fleet),
        Probes(producer.fleet, settings.scale_from_zero_s),
        Description(settings),
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with producer, ring.watched():
            yield

    routes = [
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        Route("/pooling", pooling.create, methods=["POST"]),
        Route("/tokenize", tokenizing.tokenize, methods=["POST"]),
        Route("/detokenize", tokenizing.detokenize, methods=["POST"]),
        Route("/v1/models", models.list_all),
        Route("/v1/models/{name:path}", models.retrieve),
        Route("/health", probes.health),
        Route("/ping", probes.health, methods=["GET", "POST"]),
        Route("/livez", probes.live),
        Route("/ready", probes.ready),
        Route("/version", version),
        Route(METRICS_PATH, MetricsEndpoint().show),
        Route("/openapi.json", description.machines),
        Route("/docs", description.people),
    ]
    app = Starlette(
        routes=routes,
        middleware=[  # outermost first
            Middleware(RequestId),
            Middleware(AccessLog, routes),
            *([Middleware(Cors, settings.cors_allow_origin)] if settings.cors_allow_origin else []),
            Middleware(ErrorBodies),
            Middleware(Keys, ring, metrics_open=settings.metrics_open),
            Middleware(Settlement, quota),
            Middleware(BodyLimit, settings.payload_limit, settings.bodies_limit_bytes),
        ],
        exception_handlers={HTTPException: pass_on},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would be an answer without our error body
    return app
