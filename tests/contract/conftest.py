"""The servers that all cases share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .servers import Servers


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz-examples` is there when pytest is called with this folder."""
    parser.addoption("--fuzz-examples", type=int, default=300, help="fuzz: requests made of the API's description")


@pytest.fixture(scope="session")
def servers(
    _own_folders: None, redis_url: str, tmp_path_factory: pytest.TempPathFactory, wordpiece_json: str
) -> Iterator[Servers]:
    """Servers by kind, started when first asked for."""
    running = Servers(redis_url, tmp_path_factory.mktemp("contract"), wordpiece_json)
    try:
        yield running
    finally:
        running.stop()
