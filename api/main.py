"""One API process: logs, socket and the uvicorn server."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from embedstream.shared import exits
from embedstream.shared.logs import configure, get_logger
from embedstream.shared.settings import Settings

from .app import create_app

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than load balancers keep an idle connection (60 s), or they would meet a closed one
_HEADER_BYTES = 64 * 1024  # request line and headers; bodies have their own limit
_DRAIN_SHARE = 0.8  # of the shutdown time for requests under way; the rest is for closing the producer

log = get_logger()


class _Server(uvicorn.Server):
    """Uvicorn, but a stop that was asked for is no death by signal: `run` returns and the exit code is ours."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second Ctrl-C no longer waits for requests."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def run(settings: Settings, fd: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: everything an operator can set.
        fd: a bound socket inherited from the supervisor, shared by its API processes; None binds host and port.

    Returns:
        The exit code of the process.

    Raises:
        ServerNotFound: no Redis URL is set, and none or several servers are running on this machine.
    """
    try:
        listener = socket.socket(fileno=fd) if fd is not None else _listen(settings.host, settings.port)
    except OSError as error:
        where = f"file descriptor {fd}" if fd is not None else f"{settings.host}:{settings.port}"
        exits.complain(f"cannot listen on {where}: {error.strerror or error}")
        return exits.UNAVAILABLE
    with listener:
        configure(settings, "api")
        return _serve(create_app(settings), listener, settings)


def _serve(app: Starlette, listener: socket.socket, settings: Settings) -> int:
    config = uvicorn.Config(
        app,
        access_log=False,  # AccessLog has ours
        log_config=None,
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout_s * _DRAIN_SHARE)),
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    host, port = listener.getsockname()[:2]
    log.info("api.listening", url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    _Server(config).run(sockets=[listener])
    log.info("api.stopped")
    return exits.OK


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. It listens at once: a port in use is known here, not after the server has started."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
