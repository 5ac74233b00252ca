from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.requirement_files import check_requirements

from .made_files import WHOLE, Make, recipe_of

FILE = Path("file.json")


@pytest.mark.parametrize(
    "requirements",
    [
        None,
        {},
        {"python": ">=3.8"},
        {"numpy": ">=1", "pytorch": ">=2,<99"},
        {"numpy": {"specifier": ">=1", "reason": "older ones cannot"}},
        {"numpy": ""},
        {"sentence-transformers": ">=99"},
    ],
)
def test_requirements_that_are_met(requirements: Any) -> None:
    check_requirements(FILE, requirements)


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ({"numpy": ">=99"}, r"the model needs 'numpy>=99', but \d.* is installed"),
        ({"numpy": {"specifier": "<1", "reason": "newer ones cannot"}}, "is installed: 'newer ones cannot'"),
        ({"python": "<3"}, r"the model needs 'python<3', but 3\."),
        ({"pytorch": "<1"}, "the model needs 'torch<1'"),
        ({"no-such-package": ""}, "the model needs 'no-such-package', but none is installed"),
        ({"": ">1"}, "but none is installed"),
        ({"numpy": "newest"}, "'newest' of 'numpy' names no versions"),
        ({"numpy": 3}, "3 of 'numpy' names no versions"),
        ({"numpy": None}, "None of 'numpy' names no versions"),
        (["numpy"], "not a table of versions"),
    ],
)
def test_requirements_that_are_not_met(requirements: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"file\.json: .*{message}"):
        check_requirements(FILE, requirements)


def test_they_are_looked_at_when_a_model_is_read(make: Make) -> None:
    with pytest.raises(ModelLoadError, match=f"{WHOLE}: the model needs 'numpy>=99'"):
        recipe_of(make(others={WHOLE: {"requirements": {"numpy": ">=99"}}}))
