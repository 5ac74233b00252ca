from __future__ import annotations

import socket

import pytest

from embedstream.deploy.listener import bind, url_of
from embedstream.shared.errors import Unavailable


def test_it_listens_at_once_so_that_nobody_else_can() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
        with pytest.raises(Unavailable, match=rf"port {port} of 127\.0\.0\.1 is taken.*--port"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(Unavailable, match=r"cannot listen on port 0 of 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),  # noqa: S104 - not bound
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_the_url_is_one_that_works_here(host: str, url: str) -> None:
    assert url_of(host, 80) == url
