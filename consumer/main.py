"""Start a consumer: load the model, then serve it until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time

from redis.exceptions import RedisError

from embedstream.shared import exits, logs
from embedstream.shared.cards import Announcement
from embedstream.shared.connections import connect, connect_reader, connect_sync, is_refusal
from embedstream.shared.errors import ModelLoadError, ServerNotFound
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings
from embedstream.shared.urls import without_password

from .heartbeat import Heartbeat
from .model import Model
from .worker import Worker

CPU_BATCH_TOKENS = 4096  # larger batches fall out of a CPU's cache
CUDA_BATCH_TOKENS = 65_536
STATUS_TTL_S = 3600
DRAIN_SHARE = 0.75  # of the time to stop; the rest is for saying goodbye to a Redis that may be slow

log = get_logger()


def run(settings: Settings) -> int:
    """Serve `settings.model` from the queue at `settings.redis_url` until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 after a clean stop, 78 when the model cannot be loaded.
    """
    if settings.redis_url is None:
        raise ServerNotFound("A consumer needs --redis-url.")
    logs.configure(settings, "consumer")
    consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    keys = Keys(settings.key_prefix, settings.served_names[0])
    try:
        model = Model.load(settings)
    except ModelLoadError as error:
        log.error("consumer.model_not_loaded", model=settings.model, reason=str(error))
        _leave_reason(settings.redis_url, keys.status(consumer), str(error))
        exits.complain(str(error))
        return exits.FINAL
    try:
        asyncio.run(_serve(settings, settings.redis_url, model, keys, consumer))
    except RedisError as error:
        if not is_refusal(error):
            raise
        exits.complain(f"Redis at {without_password(settings.redis_url)} refuses us: {error}")
        return exits.FINAL
    return exits.OK


async def _serve(settings: Settings, url: str, model: Model, keys: Keys, consumer: str) -> None:
    redis, reader = connect(url), connect_reader(url)
    announcement = Announcement(
        consumer=consumer,
        model=model.card.model,
        names=settings.served_names,
        fingerprint=model.card.fingerprint.hex(),
        dimension=model.recipe.dimension,
        max_length=model.recipe.max_length,
        pooling=model.recipe.pooling.value,
        dtype=model.dtype,
        device=str(model.device),
        revision=model.card.revision,
        started_s=time.time(),
    )
    heartbeat = Heartbeat(
        url, keys, model.card, announcement, settings.heartbeat_interval_ms, settings.heartbeat_ttl_ms
    )
    budget = settings.batch_tokens or (CUDA_BATCH_TOKENS if model.device.type == "cuda" else CPU_BATCH_TOKENS)
    drain_timeout_s = settings.shutdown_timeout_s * DRAIN_SHARE
    worker = Worker(
        model, redis, reader, keys, consumer, heartbeat, budget, drain_timeout_s, where=without_password(url)
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    try:
        await worker.run()
    finally:
        await reader.aclose()
        await redis.aclose()


def _leave_reason(url: str, key: str, reason: str) -> None:
    """Say in Redis why this consumer does not serve, for those who look from afar."""
    client = connect_sync(url)
    try:
        client.set(key, reason, ex=STATUS_TTL_S)
    except (RedisError, OSError) as error:
        log.warning("consumer.reason_not_left", error=repr(error))
    finally:
        client.close()
