"""The sample corpus carries the notices that its sources ask for."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "bench" / "data"


def test_every_source_is_named_with_its_licence() -> None:
    with gzip.open(DATA / "passages.sample.jsonl.gz", "rt") as lines:
        sources = Counter(json.loads(line)["src"] for line in lines)
    notice = (DATA / "NOTICE").read_text()
    named = re.findall(r"^(\S+) \S+ \((\d+) passages.*?\): (.*)$", notice, re.MULTILINE)
    assert {name: int(count) for name, count, _ in named} == sources
    for _, _, licence in named:
        assert "public domain" in licence or (DATA / licence.rsplit(" ", 1)[1]).is_file(), licence
