"""The HTTP socket that the API processes share, and how it is reached from this machine."""

from __future__ import annotations

import errno
import socket

from embedstream.shared.errors import Unavailable

_BACKLOG = 2048
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - looked up, not bound


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    It listens at once: as long as nobody listens, a second server may bind the same port.

    Raises:
        Unavailable: the port is taken, or the address is not ours to bind.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        where = f"port {port} of {host or 'all addresses'}"
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(f"{where} is taken: stop what listens there, or choose another --port") from error
        raise Unavailable(f"cannot listen on {where}: {error.strerror or error}") from error


def reachable_host(host: str) -> str:
    """The address by which a server bound to `host` is reached from this machine."""
    return _EVERYWHERE.get(host, host)


def url_of(host: str, port: int) -> str:
    """The server's URL as seen from this machine."""
    shown = reachable_host(host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
