"""The table of docs/models.md: one line a family, and its largest error for each way of pooling."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: make parity-table -->", "<!-- end of table -->"
PROPERTY = "parity"

MODES = ("cls", "lasttoken", "mean", "max", "mean_sqrt_len_tokens", "weightedmean")
"""Of the pooling module, as sentence-transformers calls them."""
SEVERAL, EACH_TOKEN = "several", "each token"
_HEADS = ("family", "`model_type`", "batches", *(f"`{mode}`" for mode in MODES), SEVERAL, EACH_TOKEN)


def row(family: str, model_type: str, batches: str, errors: Mapping[str, float]) -> dict[str, Any]:
    """A line, as a test hands it to the end of the run."""
    return {
        "family": family,
        "model_type": model_type,
        "batches": batches,
        "errors": [errors[way] for way in (*MODES, SEVERAL, EACH_TOKEN)],
    }


def write(rows: Iterable[Mapping[str, Any]]) -> None:
    """Put the table between the marks of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [_HEADS, ("---", "---", "---", *("---:" for _ in _HEADS[3:])), *map(_cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    PAGE.write_text(f"{before}{BEGIN}\n{_circumstances()}\n\n{table}\n{END}{after}")


def families_on_the_page() -> list[tuple[str, str, str]]:
    """(name, model type, how its batches are computed) of each line."""
    _, _, rest = PAGE.read_text().partition(BEGIN)
    return re.findall(r"^\| (.+?) \| `(.+?)` \| (.+?) \|", rest.partition(END)[0].partition("---:")[2], re.MULTILINE)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["family"], f"`{row['model_type']}`", row["batches"], *(_shown(error) for error in row["errors"]))


def _shown(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _circumstances() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("sentence-transformers", "transformers", "torch"))
    return f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, float32, {versions}."
