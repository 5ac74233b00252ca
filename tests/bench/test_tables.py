from __future__ import annotations

from pathlib import Path

import pytest
from tables import put_between_marks, table


def test_a_table_has_numbers_on_the_right() -> None:
    lines = [*table(["side", "tokens/s"], [["ours", "5"]])]
    assert lines == ["| side | tokens/s |", "| --- | ---: |", "| ours | 5 |"]


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin -->\nold\n<!-- end -->\nbehind\n<!-- begin x -->\nkept\n<!-- end x -->\n")
    put_between_marks(page, "begin", "end", "new \\1")
    written = page.read_text()
    assert written == "before\n<!-- begin -->\nnew \\1\n<!-- end -->\nbehind\n<!-- begin x -->\nkept\n<!-- end x -->\n"
    with pytest.raises(SystemExit, match="lacks the marks"):
        put_between_marks(page, "other", "end", "new")
