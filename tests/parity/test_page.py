from __future__ import annotations

from .families import FAMILIES
from .report import families_on_the_page


def test_the_page_lists_every_family() -> None:
    expected = [(family.name, family.model_type) for family in FAMILIES]
    assert families_on_the_page() == expected, "make parity-table writes it anew"
