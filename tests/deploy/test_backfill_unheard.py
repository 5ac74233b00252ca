"""A backfill of which nobody hears any more: the work goes on, and the exit code tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from embedstream.deploy.backfill_events import Events
from embedstream.deploy.backfill_unheard import Unheard, open_missing
from embedstream.deploy.backfill_view import Bar, Lines
from embedstream.producer.backfill.backfill import Outcome
from embedstream.producer.backfill.progress import Progress

open_missing()
progress = Progress()
progress.begin(10)
view = {"lines": lambda: Lines(progress, "out", ""), "bar": lambda: Bar(progress, "out", ""),
        "json": lambda: Events(progress, "in", "out")}[sys.argv[1]]()
heard = Unheard(view)
for state in ("waiting: a", "waiting: b"):
    progress.state = state
    heard.show()
heard.stopping()
heard.interrupted()
heard.finished(Outcome(True, 1, 2, Path("s"), Path("b")))
heard.close()
print("more words", file=sys.stderr)
sys.exit(65)
"""


@pytest.mark.parametrize("view", ["lines", "bar", "json"])
def test_a_reader_that_went_away_ends_nothing(view: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run([sys.executable, "-c", PROGRAM, view], stdout=writer, stderr=writer, check=False)
    finally:
        os.close(writer)
    assert ended.returncode == 65


@pytest.mark.parametrize("view", ["lines", "json"])
def test_closed_streams_end_nothing(view: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    closing = f'"{sys.executable}" "{program}" {view} >&- 2>&-'
    assert subprocess.run(closing, shell=True, check=False).returncode == 65  # noqa: S602 # shells close streams
