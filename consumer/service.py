"""One consumer at work: connections, heartbeat and worker around something that embeds, until SIGTERM.

It knows no torch: what embeds may be a model, or in tests something that stands for one.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass

from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.connections import connect, connect_reader
from embedstream.shared.keys import Keys
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer
from embedstream.shared.urls import without_password

from .heartbeat import Heartbeat
from .outcome import Embeds
from .worker import Worker

DRAIN_SHARE = 0.75  # of the time to stop; the rest is for saying goodbye to a Redis that may be slow


@dataclass(frozen=True, slots=True)
class Served:
    """What a consumer serves.

    Args:
        card: of the model.
        tokenizer: made of the card, for jobs that carry text.
        embedder: runs micro-batches, on one thread.
        dtype: number format of the forward pass, to be shown.
        device: where it runs, to be shown.
        budget: most tokens of a micro-batch, padding included.
    """

    card: ModelCard
    tokenizer: TextTokenizer
    embedder: Embeds
    dtype: str
    device: str
    budget: int


def new_name() -> str:
    """A name for this consumer in the group, never used before."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


async def serve(settings: Settings, url: str, served: Served, consumer: str) -> None:
    """Serve a model from the queue until SIGTERM or SIGINT.

    Args:
        settings: timings and limits.
        url: of Redis.
        served: loaded and warm.
        consumer: name in the group.

    Raises:
        RedisError: Redis refuses us; what may pass by itself is tried again for ever.
    """
    card = served.card
    keys = Keys(settings.key_prefix, card.model)
    announcement = Announcement(
        consumer=consumer,
        model=card.model,
        names=settings.served_names,
        fingerprint=card.fingerprint.hex(),
        dimension=card.recipe.dimension,
        max_length=card.recipe.max_length,
        pooling=card.recipe.pooling.value,
        dtype=served.dtype,
        device=served.device,
        revision=card.revision,
        started_s=time.time(),
    )
    redis, reader = connect(url), connect_reader(url)
    heartbeat = Heartbeat(url, keys, card, announcement, settings.heartbeat_interval_ms, settings.heartbeat_ttl_ms)
    worker = Worker(
        card,
        served.tokenizer,
        served.embedder,
        redis,
        reader,
        keys,
        consumer,
        heartbeat,
        served.budget,
        settings.shutdown_timeout_s * DRAIN_SHARE,
        where=without_password(url),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    try:
        await worker.run()
    finally:
        await reader.aclose()
        await redis.aclose()
