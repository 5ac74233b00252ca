"""The servers that all cases share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .case import Case
from .servers import Servers


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz-examples` is there when pytest is called with this folder."""
    parser.addoption("--fuzz-examples", type=int, default=300, help="fuzz: requests made of the API's description")


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest,
    _own_folders: None,
    redis_url: str,
    tmp_path_factory: pytest.TempPathFactory,
    wordpiece_json: str,
) -> Iterator[Servers]:
    """Servers by kind. Those that cases name start at once, while the consumers load; others when first asked for."""
    running = Servers(redis_url, tmp_path_factory.mktemp("contract"), wordpiece_json)
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    cases = (call.params.get("case") for call in calls if call is not None)
    try:
        running.start({case.server for case in cases if isinstance(case, Case)})
        yield running
    finally:
        running.stop()
