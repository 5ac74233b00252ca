"""Input for backfills: rows whose vectors are known beforehand, and rows that are bad in a known way."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from . import toy

FILES = 4
_TOO_LONG = 600
_NULL, _LONG = 0.5, 0.25
"""Shares of the bad rows: nulls, and texts above the model's limit; the others are lines that are no JSON."""


@dataclass(frozen=True)
class Kind:
    """What an input is like.

    Args:
        suffix: `.parquet`, `.jsonl` or `.jsonl.gz`; `.jsonl*` takes turns between the last two.
        repeated: share of the texts that came before.
        bad: share of the rows that are bad; in Parquet, where no row can be torn, three quarters of it.
        tokens: fewest and most tokens of a text, but for three that number it.
    """

    suffix: str = ".parquet"
    repeated: float = 0.15
    bad: float = 0.04
    tokens: tuple[int, int] = (4, 16)


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Args:
        id: of the row; rising, and no two are equal.
        text: what is embedded; None for a null.
        ids: token ids of the text.
        reason: why it is bad, or "".
    """

    id: int
    text: str | None
    ids: tuple[int, ...] = ()
    reason: str = ""


@dataclass
class Corpus:
    """An input folder and what must become of it.

    Args:
        folder: of its files.
        rows: of all files, in their order; each with the name of its file and its place there.
    """

    folder: Path
    rows: list[tuple[str, int, Row]] = field(default_factory=list)

    @property
    def good(self) -> list[Row]:
        """Rows that get a vector, in order."""
        return [row for _, _, row in self.rows if not row.reason]

    @property
    def bad(self) -> list[tuple[str, int, str]]:
        """File, place and reason of the others, in order."""
        return [(file, place, row.reason) for file, place, row in self.rows if row.reason]

    @property
    def n_unique(self) -> int:
        """Texts that have to be computed."""
        return len({row.ids for row in self.good})

    def expected(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(good,) ids and (good, 8) vectors of the output."""
        good = self.good
        return np.array([row.id for row in good]), toy.expected([row.ids for row in good])


def make(folder: Path, seed: int, n_rows: int, kind: Kind) -> Corpus:
    """Write an input of several files.

    Args:
        folder: made new.
        seed: of the rows.
        n_rows: of all files.
        kind: of its rows and files.
    """
    folder.mkdir()
    corpus, chosen = Corpus(folder), random.Random(seed)
    texts: list[tuple[int, ...]] = []
    for number in range(FILES):
        rows = [_row(chosen, texts, number * n_rows + place, kind) for place in range(n_rows // FILES)]
        suffix = kind.suffix if kind.suffix != ".jsonl*" else (".jsonl", ".jsonl.gz")[number % 2]
        path = folder / f"{number}{suffix}"
        _write(path, rows)
        corpus.rows += [(path.name, place, row) for place, row in enumerate(rows)]
    return corpus


def _row(chosen: random.Random, texts: list[tuple[int, ...]], row_id: int, kind: Kind) -> Row:
    dice = chosen.random()
    if dice < kind.bad * _NULL:
        return Row(row_id, None, reason="null")
    if dice < kind.bad * (_NULL + _LONG):
        return Row(row_id, " ".join(["17"] * _TOO_LONG), reason="too_long")
    if dice < kind.bad and kind.suffix != ".parquet":
        return Row(row_id, '{"id": 1, "te', reason="undecodable")
    if texts and chosen.random() < kind.repeated:
        ids = chosen.choice(texts)
    else:
        body = [chosen.randrange(toy.FIRST, toy.VOCABULARY) for _ in range(chosen.randint(*kind.tokens))]
        ids = toy.tagged(len(texts), 0, body)
        texts.append(ids)
    return Row(row_id, " ".join(map(str, ids)), ids)


def _write(path: Path, rows: Sequence[Row]) -> None:
    if path.suffix == ".parquet":
        table = pa.table({"id": [row.id for row in rows], "text": [row.text for row in rows]})
        pq.write_table(table, path, row_group_size=1000)
        return
    data = "".join(f"{_line(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def _line(row: Row) -> str:
    return str(row.text) if row.reason == "undecodable" else json.dumps({"id": row.id, "text": row.text})
