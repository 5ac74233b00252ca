"""One API process: logs, socket and the uvicorn server."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from embedstream.shared import exits
from embedstream.shared.logs import configure, get_logger
from embedstream.shared.settings import Settings

from .app import create_app
from .errors import is_news
from .server import PROBE_CONNECTIONS, bound_to

_BACKLOG = 2048
_KEEP_ALIVE_PROBES = 4  # of the kernel, before it takes a silent peer for gone
_SWITCH_S = 0.001  # how long a thread keeps the interpreter from the event loop: the default is five times that
_THREADS = 3  # for large requests: each contends with the event loop for the interpreter, and tokenizers has its own
_SPARE_FILES = 128  # beside clients: Redis, logs, metrics, a probe
_DRAIN_SHARE = 0.8  # of the shutdown time for requests under way; the rest is for closing the producer

log = get_logger()


class _Server(uvicorn.Server):
    """Uvicorn, but a stop that was asked for is no death by signal: `run` returns and the exit code is ours."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; what is there by then stays, so the collector of cycles need never look at it again.

        It would do so on the event loop, for 100 ms and more.
        """
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "large"))
        await super().startup(sockets)
        gc.collect()
        gc.freeze()

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
        http=bound_to(settings),
        access_log=False,  # AccessLog has ours
        log_config=None,
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout_s * _DRAIN_SHARE)),
    )
    logging.getLogger("uvicorn.error").addFilter(is_news)
    sys.setswitchinterval(_SWITCH_S)
    _allow_files(settings.max_connections + PROBE_CONNECTIONS + _SPARE_FILES)
    _notice_dead_peers(listener, settings)
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


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as we may: without one to spare a server accepts nobody, not even probes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    if allowed < wanted:
        log.warning("api.few_files", allowed=allowed, wanted=wanted, setting="--max-connections")


def _notice_dead_peers(listener: socket.socket, settings: Settings) -> None:
    """Have the kernel end connections whose peer vanished without a word; accepted sockets inherit these options."""
    idle_s = settings.keep_alive_timeout_s
    options = {
        "TCP_KEEPIDLE": idle_s,
        "TCP_KEEPINTVL": max(1, idle_s // _KEEP_ALIVE_PROBES),
        "TCP_KEEPCNT": _KEEP_ALIVE_PROBES,
        "TCP_USER_TIMEOUT": int(settings.write_timeout_s * 1000),
    }
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # macOS has not all of them
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
