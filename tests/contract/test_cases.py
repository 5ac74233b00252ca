"""All cases that are data, each against the server it names."""

from __future__ import annotations

import pytest

from .case import Case, covers
from .cases_answers import CASES as ANSWERS
from .cases_errors import CASES as ERRORS
from .cases_headers import CASES as HEADERS
from .cases_inputs import CASES as INPUTS
from .cases_length import CASES as LENGTH
from .cases_neighbours import CASES as NEIGHBOURS
from .cases_partial import CASES as PARTIAL
from .cases_pooling import CASES as POOLING
from .cases_prompts import CASES as PROMPTS
from .cases_request import CASES as REQUEST
from .cases_sizes import CASES as SIZES
from .described import Description
from .servers import KEY, Servers

pytestmark = pytest.mark.integration

CASES = [
    case
    for group in (REQUEST, INPUTS, LENGTH, SIZES, ANSWERS, ERRORS, HEADERS, PARTIAL, NEIGHBOURS, POOLING, PROMPTS)
    for case in group
]


@pytest.fixture(scope="module")
def description(servers: Servers) -> Description:
    return Description(servers["keyed"].ask("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json)


@covers("E-DOC-01")
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_case(case: Case, servers: Servers, description: Description) -> None:
    reply = case.run(servers[case.server])
    description.check(case.method, case.path, reply)
