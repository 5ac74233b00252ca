"""Tables of measurements, and the places in the pages where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; the first column is text, the others are numbers."""
    columns = list(head)
    yield f"| {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * (len(columns) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def put_between_marks(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two comments of a page.

    Args:
        page: a Markdown file.
        begin: of the comment before, such as `table: make precision`.
        end: of the comment behind.
        text: what stands there from now on.

    Raises:
        SystemExit: the page lacks the comments.
    """
    first, last = f"<!-- {begin} -->", f"<!-- {end} -->"
    marked = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    written = page.read_text("utf-8")
    if not marked.search(written):
        raise SystemExit(f"{page} lacks the marks {first} and {last}")
    page.write_text(marked.sub(lambda _: f"{first}\n{text}\n{last}", written), "utf-8")
