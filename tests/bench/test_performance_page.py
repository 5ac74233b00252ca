"""The page that `make bench-engine` writes into."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import engine
import profile_batch
import pytest
from tables import put_between_marks

from embedstream.shared.settings import Settings, flag_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text("utf-8")


def test_flags_to_set_are_settings() -> None:
    listed = PAGE[PAGE.index("## What to set") : PAGE.index("## Measure it")]
    flags = re.findall(r"^\| (`--.*?) \|", listed, re.MULTILINE)
    assert len(flags) > 5
    for flag in re.findall(r"`(--[\w-]+)`", " ".join(flags)):
        assert flag in {flag_of(name) for name in Settings.model_fields}, flag


def test_modules_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:consumer/encoders/)?[\w]+\.py)`", PAGE[: PAGE.index("## What to set")])
    assert named
    for name in named:
        assert any((ROOT / folder / name).exists() for folder in ("", "consumer", "consumer/encoders")), name


@pytest.mark.parametrize(
    ("source", "marks"),
    [(engine.PAGE, engine.MARKS), (profile_batch.PAGE, profile_batch.MARKS)],
    ids=["engine", "batch"],
)
def test_tables_have_their_place_on_the_page(source: Path, marks: tuple[str, str], tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    shutil.copy(source, page)
    put_between_marks(page, *marks, "| a table |")
    assert "| a table |" in page.read_text("utf-8")
