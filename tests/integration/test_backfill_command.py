"""The command as people run it: with a model of its own, and beside a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from tests.conftest import Serving
from typer.testing import CliRunner

from embedstream.deploy import cli

pytestmark = pytest.mark.integration

TOLERANCE = 1e-5
TEXTS = [
    "A queue decouples those who ask from those who answer.",
    "Vectors of like texts lie near each other.",
    "",
    "Grüße aus Köln 🙂",
    "A queue decouples those who ask from those who answer.",
    "word " * 200,
    "one more",
]
TOO_LONG = "word " * 600
NULL_ROW, LONG_ROW = 3, 8


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows that can be embedded, a null, and one that is too long."""
    texts: list[str | None] = [*TEXTS]
    texts.insert(NULL_ROW, None)
    texts.insert(LONG_ROW, TOO_LONG)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"name": [f"n{row}" for row in range(len(texts))], "body": texts, "of": texts}), path)
    return path


@pytest.fixture
def _no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag of consumers that a test has not set itself is complained of where none is started."""
    monkeypatch.delenv("EMBEDSTREAM_MEASURE_MS")


def backfill(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embedstream.deploy", "backfill", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


def vectors_in(out: Path, names: Sequence[str], column: str = "embedding") -> NDArray[np.float32]:
    table = pq.read_table(out)
    assert table.column("name").to_pylist() == names
    return np.stack(table.column(column).to_numpy()).astype(np.float32)


NAMES = [f"n{row}" for row in range(len(TEXTS) + 2) if row not in {NULL_ROW, LONG_ROW}]


def test_alone_it_makes_the_vectors_of_the_api(rows: Path, tmp_path: Path, serving: Serving) -> None:
    with tempfile.TemporaryDirectory(prefix="es-") as elsewhere:  # where no server is to be found
        hidden = {"XDG_RUNTIME_DIR": elsewhere, "TMPDIR": elsewhere}
        out = tmp_path / "out"
        flags = ["--text-column", "body", "--id-column", "name", "--dtype", "float32"]
        done = backfill(rows, out, *flags, **hidden)
        assert done.returncode == 65, done.stderr
        assert not [*Path(elsewhere).glob("*/*")]  # it left nothing
    side_file = tmp_path / "out.bad-rows.jsonl"
    assert f"{len(TEXTS)} rows in {out} · 2 bad rows, told in {side_file} · " in done.stdout
    bad = [json.loads(line) for line in side_file.read_text().splitlines()]
    assert [(row["row"], row["id"], row["reason"]) for row in bad] == [
        (NULL_ROW, f"n{NULL_ROW}", "null"),
        (LONG_ROW, f"n{LONG_ROW}", "too_long"),
    ]
    assert np.abs(vectors_in(out, NAMES) - serving.embed(TEXTS)).max() <= TOLERANCE


@pytest.mark.usefixtures("_no_flags")
def test_beside_a_server_it_joins_it(rows: Path, tmp_path: Path, serving: Serving) -> None:
    out = tmp_path / "one.parquet"
    flags = ["--text-column", "name", "--text-column", "body", "--template", "{name}: {body}", "--id-column", "name"]
    flags += ["--where", "name >= 'n4'", "--carry", "of", "--truncate", "--vector-dtype", "float16"]
    flags += ["--vector-column", "v", "--dimensions", "64", "--json", "--part-rows", "2", "--threads", "1"]
    done = backfill(rows, out, *flags)
    assert done.returncode == 0, done.stderr
    assert "--threads not used" in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "finished"
    assert {"started", "part", "progress"} <= {event["event"] for event in events}
    table = pq.read_table(out)
    assert table.schema.names == ["name", "of", "v"]
    assert table.schema.field("v").type == pa.list_(pa.float16(), 64)
    asked = [f"n{row}" for row in range(4, len(TEXTS) + 2)]
    texts = [f"{name}: {text}" for name, text in zip(asked, [*TEXTS[3:], TOO_LONG], strict=True)]
    assert texts[-2:] == ["n7: one more", f"n8: {TOO_LONG}"]
    expected = serving.embed(texts, dimensions=64, truncate_prompt_tokens=-1)
    assert np.abs(vectors_in(out, asked, "v") - expected).max() <= 1e-3  # what float16 leaves of numbers below 1
    assert pc.all(pc.equal(table.column("of"), pa.chunked_array([[*TEXTS[3:], TOO_LONG]]))).as_py()


@pytest.mark.usefixtures("same_logging")
@pytest.mark.usefixtures("_no_flags")
def test_mistakes_are_one_line(rows: Path, tmp_path: Path, serving: Serving) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "something").touch()
    out = tmp_path / "out"
    for arguments, words in [
        ((tmp_path / "nothing.parquet", out), "nothing.parquet"),
        ((rows, out), "no column `text`"),
        ((rows, out, "--text-column", "body", "--id-column", "id"), "no column `id`"),
        ((rows, out, "--text-column", "body", "--id-column", "of", "--vector-column", "of"), "column `of`"),
        ((rows, out, "--text-column", "body", "--where", "of = "), "--where"),
        ((rows, out, "--text-column", "body", "--template", "{body"), "--template"),
        ((rows, tmp_path / "out.xlsx", "--text-column", "body"), ".xlsx"),
        ((rows, taken, "--text-column", "body"), "holds something already"),
    ]:
        result = CliRunner().invoke(cli.app, ["backfill", *map(str, arguments)])
        assert (result.exit_code, result.stdout) == (78, ""), result.output
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert words in result.stderr
    assert not out.exists()
    assert not (tmp_path / "out.backfill").exists()
