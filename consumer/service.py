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
from contextlib import suppress
from dataclasses import dataclass

from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.connections import connect, connect_reader
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer
from embedstream.shared.urls import without_password

from .budget import Budget
from .heartbeat import Heartbeat
from .outcome import Embeds
from .pace import Pace
from .publisher import DeadLetterBounds
from .watchdog import State, Watchdog
from .worker import Clients, Limits, Worker

DRAIN_SHARE = 0.6  # of the time to stop; the rest is for saying goodbye to a Redis that may be slow

log = get_logger()


@dataclass(frozen=True, slots=True)
class Served:
    """What a consumer serves.

    Args:
        card: of the model.
        tokenizer: made of the card, for jobs that carry text.
        embedder: runs micro-batches, on one thread.
        dtype: number format of the forward pass, to be shown.
        device: where it runs, to be shown.
        budget: of a micro-batch.
        pace: what is known of the embedder's speed.
    """

    card: ModelCard
    tokenizer: TextTokenizer
    embedder: Embeds
    dtype: str
    device: str
    budget: Budget
    pace: Pace


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
        pooling=card.recipe.pooling_name,
        dtype=served.dtype,
        device=served.device,
        revision=card.revision,
        started_s=time.time(),
        pooling_source=card.recipe.pooling_source,
    )
    loop = asyncio.get_running_loop()
    watchdog = Watchdog(settings.watchdog_s)
    clients = Clients(connect(url), connect_reader(url), connect_reader(url), without_password(url))

    def moved(state: State) -> None:
        if state is State.LOST:
            _end_now(consumer)
        with suppress(RuntimeError):  # the loop has ended: nobody has anything left to give back
            loop.call_soon_threadsafe(worker.watchdog_says, state)

    heartbeat = Heartbeat(
        url,
        keys,
        card,
        announcement,
        settings.heartbeat_interval_ms,
        settings.heartbeat_ttl_ms,
        watchdog,
        served.pace.tokens_per_s,
        moved,
    )
    worker = Worker(
        card,
        served.tokenizer,
        served.embedder,
        clients,
        keys,
        consumer,
        heartbeat,
        watchdog,
        served.pace,
        served.budget,
        _limits(settings),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    try:
        await worker.run()
    finally:
        for client in (clients.lanes, clients.notices, clients.commands):
            await client.aclose()


def _limits(settings: Settings) -> Limits:
    return Limits(
        drain_timeout_s=settings.shutdown_timeout_s * DRAIN_SHARE,
        lease_check_s=settings.lease_check_ms / 1000,
        lease_backstop_s=settings.lease_backstop_s,
        max_consumer_deaths=settings.max_consumer_deaths,
        latency_slice_s=settings.latency_slice_ms / 1000,
        bulk_share=settings.bulk_share_percent / 100,
        dead_letters=DeadLetterBounds(settings.dead_letter_limit, settings.dead_letter_ttl_s),
    )


def _end_now(consumer: str) -> None:
    """End a process whose device or event loop is lost: no thread of it can be trusted to end by itself."""
    log.critical("consumer.lost", consumer=consumer, reason="a batch or the event loop does not end")
    os._exit(os.EX_SOFTWARE)
