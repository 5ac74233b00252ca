"""Whatever fits `/openapi.json`, or does not, gets an answer that fits it: `make fuzz` sends more of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from embedstream.api.operations import OPERATIONS, Operation

from .case import covers
from .client import Api
from .servers import Servers

pytestmark = pytest.mark.integration

SERVER = "any"
"""With a chat template, every size, and no words that make the model fail."""
FEW = 300
"""Examples of an ordinary run: always the same. More than that are new ones each time."""
_CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
_SHARES = {"createEmbedding": 0.4, "createPooling": 0.3, "tokenize": 0.1, "detokenize": 0.1}
_LEAST = 2
_TIMEOUT = "x-request-timeout-ms"
_DIGITS = 5
"""Whoever waits for less than ten seconds may wait in vain."""


@pytest.fixture(scope="module")
def api(servers: Servers) -> Api:
    return servers[SERVER]


@pytest.fixture(scope="module")
def schema(api: Api) -> Any:
    return schemathesis.openapi.from_dict(api.ask("GET", "/openapi.json").json)


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False  # no proxy of the machine's stands between
        yield session


@covers("E-DOC-01", "E-ERR-01")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_answer_is_described(
    operation: Operation,
    mode: GenerationMode,
    api: Api,
    schema: Any,
    session: requests.Session,
    request: pytest.FixtureRequest,
) -> None:
    if mode is GenerationMode.NEGATIVE and operation.body is None:
        return  # there is nothing to get wrong
    examples: int = request.config.getoption("--fuzz-examples", default=FEW)
    count = max(_LEAST, round(_SHARES.get(operation.name, 0) * examples / len(GenerationMode)))

    @given(schema[operation.path][operation.method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=count,
        derandomize=examples <= FEW,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Case[Any]) -> None:
        response = case.call(base_url=f"http://127.0.0.1:{api.port}", session=session)
        sent: dict[str, str] = dict(case.headers or {})
        hurried = len(sent.get(_TIMEOUT, "")) in range(1, _DIGITS)
        assert response.status_code < 500 or (response.status_code == 504 and hurried), response.text
        case.validate_response(response, checks=_CHECKS)

    ask()
