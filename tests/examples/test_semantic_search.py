"""The worked example on a slice of its corpus: backfill, search, clusters, near-duplicates, map."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "bench" / "data"
EXAMPLE = ROOT / "examples" / "semantic_search.py"


def json_lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 passages that queries look for, and four copies of some of them with another last word."""
    sought = {query["pos"] for query in json_lines("queries.sample.jsonl.gz") if "pos" in query}
    rows = [row for row in json_lines("passages.sample.jsonl.gz") if row["id"] in sought][:300]
    long = [row for row in rows if len(row["text"].split()) > 60]
    rows += [row | {"id": f"copy-{row['id']}", "text": row["text"].rsplit(" ", 1)[0] + " anything"} for row in long[:4]]
    path = tmp_path_factory.mktemp("passages") / "passages.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def run(*command: str) -> str:
    env = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # threads of OpenMP that wait for each other on a busy machine take long
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_worked_example(serving: Any, passages: Path, tmp_path: Path) -> None:
    vectors, picture = tmp_path / "passages.parquet", tmp_path / "maps" / "map.png"
    backfill = [sys.executable, "-m", "embedstream.deploy", "backfill", str(passages), str(vectors)]
    run(*backfill, "--id-column", "id", "--carry", "src", "--carry", "text", "--truncate")
    query = "wait for a lock held by another transaction"
    files = (str(vectors), str(DATA / "queries.sample.jsonl.gz"), str(picture))
    out = run(sys.executable, str(EXAMPLE), *files, "--query", query)

    assert out.startswith("304 vectors of 384 by all-MiniLM-L6-v2\n")
    hits = re.findall(r"^  (0\.\d+)  (\S+): (.*)$", out[out.index(query) :], re.MULTILINE)
    assert len(hits) == 5
    assert "the lock" in hits[0][2]
    mrr, recall = re.findall(r"300 queries: MRR@10 (\S+), recall@10 (\S+)", out)[0]
    assert float(mrr) > 0.65  # 0.703 and 0.867 in float32
    assert float(recall) > 0.82

    clusters = re.findall(r"^ +\d+ +(\d+)  (\w+), .*  \((\d+)% (\S+)\)$", out, re.MULTILINE)
    assert sum(int(size) for size, *_ in clusters) == 304
    assert {("django", "python-django-doc"), ("sqlite", "sqlite3-doc")} <= {
        (word, source) for _, word, _, source in clusters
    }
    pairs = re.findall(r"^  (?:0\.9[5-9]|1\.0)\d*  (\S+) (\S+)  ", out, re.MULTILINE)
    assert len(pairs) == 4
    assert all(copy == f"copy-{original}" for original, copy in pairs)

    pixels = np.round(image.imread(picture)[:, :, :3] * 255).astype(int)
    assert pixels.shape == (750, 1100, 3)
    shown = {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert set(runpy.run_path(str(EXAMPLE))["COLORS"][: len(clusters)]) <= shown
