from __future__ import annotations

import pytest
from profile_batch import OTHER, PARTS, part_of, shares


def test_an_operation_counts_to_one_part() -> None:
    names = [name for operations in PARTS.values() for name in operations]
    assert len(names) == len({*names})
    assert part_of("aten::addmm") == part_of("aten::addmm_") == part_of("mkldnn::_linear_pointwise") == "linear layers"
    assert part_of("aten::bmm") == "attention"
    assert part_of("aten::never_met") == OTHER


def test_shares_add_up_to_the_whole() -> None:
    found = shares([("aten::mm", 3.0), ("aten::gelu", 1.0), ("aten::mm", 3.0), ("something", 1.0)])
    assert found["linear layers"] == pytest.approx(0.75)
    assert found[OTHER] == pytest.approx(0.125)
    assert sum(found.values()) == pytest.approx(1)
