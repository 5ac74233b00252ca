"""Every rule of docs/contract.md has a test, and every test a rule."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from .servers import ROOT


def rules() -> list[str]:
    page = (ROOT / "docs" / "contract.md").read_text()
    return re.findall(r"^\| (E-[A-Z]+-\d+) \|", page, re.MULTILINE)


def modules() -> Iterator[ModuleType]:
    package = __name__.rpartition(".")[0]
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if found.name.startswith(("cases_", "test_")) and found.name != "test_rows":
            yield importlib.import_module(f"{package}.{found.name}")


def held() -> set[str]:
    rows: set[str] = set()
    for module in modules():
        for case in getattr(module, "CASES", ()):
            rows.update(case.rows.split())
        for value in vars(module).values():
            rows.update(getattr(value, "contract_rows", ()))
    return rows


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    found = rules()
    assert len(found) > 150
    assert len(found) == len(set(found))
    assert held() - set(found) == set()
    assert set(found) - held() == set()
