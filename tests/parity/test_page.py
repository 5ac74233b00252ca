from __future__ import annotations

from embedstream.shared.architectures import MODEL_TYPES

from .families import FAMILIES, batches_of
from .report import families_on_the_page


def test_the_page_lists_every_family() -> None:
    expected = [(family.name, family.model_type, batches_of(family)) for family in FAMILIES]
    assert families_on_the_page() == expected, "make parity-table writes it anew"


def test_every_type_that_is_pooled_without_being_told_how_is_a_family() -> None:
    assert {family.model_type for family in FAMILIES} >= MODEL_TYPES
