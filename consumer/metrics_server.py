"""A consumer's own `GET /metrics`, for those that run without `serve`: it listens nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import start_http_server

from embedstream.shared import metrics
from embedstream.shared.errors import Unavailable
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings

log = get_logger()


@contextmanager
def metrics_server(settings: Settings) -> Iterator[int | None]:
    """Answer scrapes from a thread of its own while the block runs, if a port is set.

    Args:
        settings: where to listen.

    Yields:
        The port; None without a server.

    Raises:
        Unavailable: the port is not to be had.
    """
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        yield None
        return
    try:
        server, thread = start_http_server(port, host, metrics.registry())
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {host}:{port} (--metrics-host, --metrics-port): {error.strerror or error}"
        ) from error
    address = f"[{host}]" if ":" in host else host
    log.info("metrics.listening", url=f"http://{address}:{server.server_port}/metrics")
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
