"""Start a consumer: load the model, then serve it until SIGTERM."""

from __future__ import annotations

import asyncio
import os

from redis.exceptions import RedisError

from embedstream.shared import exits, load_failures, logs
from embedstream.shared.connections import connect_sync, is_refusal
from embedstream.shared.errors import EmbedstreamError, ModelLoadError, ServerNotFound, UnfitServer
from embedstream.shared.logs import get_logger, told
from embedstream.shared.settings import Settings
from embedstream.shared.urls import without_password

from .capacity import find_capacity, running_budget
from .embedder import Embedder
from .faults import BrokenDevice
from .metrics_server import metrics_server
from .model import Model
from .service import Served, new_name, serve

log = get_logger()

_MOST_CHARS = 2_000
"""Of a reason: some of what libraries say repeats whole fields of a model's files."""


def run(settings: Settings) -> int:
    """Serve `settings.model` from the queue at `settings.redis_url` until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 after a clean stop, 78 when the model cannot be loaded or the server would lose jobs, 70 when
        the device is lost.

    Raises:
        ServerNotFound: no Redis URL is set.
        Unavailable: the metrics port is not to be had.
    """
    if settings.redis_url is None:
        raise ServerNotFound("A consumer needs --redis-url.")
    logs.configure(settings, "consumer")
    with metrics_server(settings):  # it answers while the model loads
        return _run(settings, settings.redis_url)


def _run(settings: Settings, url: str) -> int:
    consumer = new_name()
    try:
        model = _load(settings)
        asyncio.run(serve(settings, url, _served(model, settings), consumer))
    except (ModelLoadError, UnfitServer) as error:
        reason = _line(str(error))
        log.error("consumer.cannot_serve", model=settings.model, reason=reason)
        _leave_reason(settings, url, consumer, reason)
        exits.complain(reason)
        return exits.FINAL
    except BrokenDevice as error:
        # Started anew the process has a new context. What was on the device when it broke is tried apart from others.
        log.critical("consumer.device_lost", reason=str(error))
        return os.EX_SOFTWARE
    except RedisError as error:
        if not is_refusal(error):
            raise
        exits.complain(f"Redis at {without_password(url)} refuses us: {error}")
        return exits.FINAL
    return exits.OK


def _line(reason: str) -> str:
    """A reason as one line of valid Unicode that is not too long to be shown."""
    line = " ".join(reason.split())  # what libraries say may have many lines
    line = line.encode(errors="backslashreplace").decode()  # names of files may be any bytes
    return line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]}…"


def _load(settings: Settings) -> Model:
    try:
        return Model.load(settings)
    except EmbedstreamError:
        raise
    except Exception as error:  # nobody has thought of it; restarting would meet it again
        log.exception("consumer.load_failed")
        raise ModelLoadError(f"{settings.model} cannot be loaded: {type(error).__name__}: {error}") from error


def _served(model: Model, settings: Settings) -> Served:
    capacity = find_capacity(model, settings)
    budget = running_budget(capacity, model.measured)
    device = str(model.device)
    return Served(model.card, model.tokenizer, Embedder(model), model.dtype, device, budget, capacity.pace())


def _leave_reason(settings: Settings, url: str, consumer: str, reason: str) -> None:
    """Say in Redis why this consumer does not serve, for those who look from afar."""
    client = connect_sync(url)
    try:
        load_failures.leave(client, settings.key_prefix, settings.served_names, consumer, reason)
    except (RedisError, OSError, UnicodeError) as error:  # of a folder whose name is no Unicode, no key can be made
        log.warning("consumer.reason_not_left", error=told(error))
    finally:
        client.close()
