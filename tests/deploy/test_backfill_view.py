from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from embedstream.deploy.backfill_events import EVERY_S, Events
from embedstream.deploy.backfill_view import LINE_S, Bar, Lines
from embedstream.producer.backfill.backfill import Outcome
from embedstream.producer.backfill.progress import Progress
from embedstream.shared.errors import Unavailable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Of a backfill that has worked for ten seconds of twenty."""
    made = Progress(total_rows=12_000, resumed_rows=2_000, rows=4_000, computed_rows=5_000, tokens=50_000, parts=2)
    made.part_rows, made.model, made.started_s, made._began_s = 2_000, "m", 0.0, 10.0
    monkeypatch.setattr("time.monotonic", lambda: 20.0)
    return made


def outcome(bad_rows: int = 0) -> Outcome:
    return Outcome(True, bad_rows, 11_998, Path("out.backfill"), Path("out.bad-rows.jsonl"))


def test_a_line_now_and_then(progress: Progress) -> None:
    clock, stderr = Clock(), io.StringIO()
    lines = Lines(progress, "out", "loading m", stderr=stderr, clock=clock)
    lines.show()
    assert stderr.getvalue() == "Going on: 2,000 rows are done already.\n"
    clock.now += LINE_S - 0.1
    lines.show()
    assert stderr.getvalue().count("\n") == 1
    clock.now += 0.1
    lines.show()
    *_, line = stderr.getvalue().splitlines()
    assert line == "58 % · 7,000 of 12,000 rows · 500 rows/s · 5,000 tokens/s · 10 s left"


def test_a_line_tells_what_is_amiss(progress: Progress) -> None:
    clock, stderr = Clock(), io.StringIO()
    lines = Lines(progress, "out", "loading m", stderr=stderr, clock=clock)
    progress.bad_rows, progress.state, progress.total_rows = 1, "waiting: no consumer of `m` is alive.", None
    clock.now += LINE_S
    lines.show()
    *_, line = stderr.getvalue().splitlines()
    assert line == "7,000 rows · 500 rows/s · 5,000 tokens/s · 1 bad row · waiting: no consumer of `m` is alive."


def test_an_estimate_is_called_one(progress: Progress) -> None:
    clock, stderr = Clock(), io.StringIO()
    lines = Lines(progress, "out", "loading m", stderr=stderr, clock=clock)
    progress.total_is_exact = False
    clock.now += LINE_S
    lines.show()
    assert stderr.getvalue().splitlines()[-1].startswith("58 % · 7,000 of about 12,000 rows · ")
    progress.computed_rows = 13_000
    clock.now += LINE_S
    lines.show()
    assert stderr.getvalue().splitlines()[-1].startswith("99 % · 15,000 of about 15,000 rows · ")


def test_before_the_model_is_there_it_is_what_is_waited_for(progress: Progress) -> None:
    clock, stderr = Clock(), io.StringIO()
    lines = Lines(progress, "out", "loading m", stderr=stderr, clock=clock)
    progress._began_s, progress.model, progress.state = None, "", "waiting: no model yet"
    progress.rows = progress.computed_rows = progress.resumed_rows = 0
    lines.show()
    assert stderr.getvalue() == "0 % · 0 of 12,000 rows · loading m\n"  # at once
    lines.show()
    assert stderr.getvalue().count("\n") == 1
    progress.model, progress.state = "m", ""
    clock.now += LINE_S
    lines.show()
    assert stderr.getvalue().endswith("rows · preparing\n")


def test_beside_a_server_the_reason_is_told(progress: Progress) -> None:
    clock, stderr = Clock(), io.StringIO()
    lines = Lines(progress, "out", "", stderr=stderr, clock=clock)
    progress._began_s, progress.model, progress.state = None, "", "waiting: no model yet"
    lines.show()
    assert stderr.getvalue().endswith("· waiting: no model yet\n")


def test_the_last_line_is_all_of_stdout(progress: Progress, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(progress, "out", "loading m")
    lines.stopping()
    lines.finished(replace(outcome(bad_rows=2), side_file=Path("out.bad-rows.jsonl").absolute()))
    lines.interrupted()
    shown = capsys.readouterr()
    assert shown.out == "11,998 rows in out · 2 bad rows, told in out.bad-rows.jsonl · 20.0 s · 400 rows/s\n"
    assert "finished first, which may take 4 s." in shown.err
    assert "The same command goes on" in shown.err
    progress.rows = 0
    lines.finished(outcome())
    assert capsys.readouterr().out == "11,998 rows in out · no bad rows · 20.0 s\n"
    lines.finished(replace(outcome(), rows=1))
    assert capsys.readouterr().out.startswith("1 row in out · ")
    lines.finished(replace(outcome(bad_rows=2), side_file=Path("/elsewhere/out.bad-rows.jsonl")))
    assert " told in /elsewhere/out.bad-rows.jsonl · " in capsys.readouterr().out


def test_an_error_says_how_to_go_on_once_there_is_something_to_go_on_with(
    progress: Progress, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(progress, "out", "loading m")
    lines.failed(Unavailable("no Redis"), 69)
    assert capsys.readouterr().err == "Stopped with 6,000 rows done. The same command goes on from there.\n"
    progress._began_s = None
    lines.failed(Unavailable("no Redis"), 69)
    assert capsys.readouterr().err == ""
    lines.interrupted()
    assert capsys.readouterr().err == "Stopped before anything was embedded.\n"


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=20, _environ={})


def written(terminal: Console) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.file.getvalue())


def test_the_bar_fits_a_terminal(progress: Progress, terminal: Console) -> None:
    bar = Bar(progress, "out", "loading m", console=terminal)
    progress.state = "waiting: a reason that is much too long to be shown in the one line that there is for it"
    bar.show()
    bar.close()
    shown = written(terminal)
    assert "58 % · 7,000 of 12,000 rows" in shown
    assert "500 rows/s · 5,000 tokens/s · 10 s left · waiting: a reason" in shown
    assert "that there is for it" not in shown  # cut, not wrapped: the bar would jump
    assert max(map(len, re.split(r"[\r\n]+", shown))) <= 80


def test_what_is_said_meanwhile_stands_above_the_bar(progress: Progress, terminal: Console) -> None:
    bar = Bar(progress, "out", "loading m", console=terminal)
    try:
        sys.stderr.write("a warning\n")
        bar.show()
        assert "a warning\n" in written(terminal)
    finally:
        bar.close()


def test_a_bar_of_unknown_length(progress: Progress, terminal: Console) -> None:
    progress.total_rows = None
    bar = Bar(progress, "out", "loading m", console=terminal)
    bar.show()
    bar.close()
    assert "7,000 rows" in written(terminal)


def events_in(stdout: io.BytesIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stdout.getvalue().splitlines()]


def test_events_tell_everything_in_order(progress: Progress) -> None:
    clock, stdout = Clock(), io.BytesIO()
    events = Events(progress, "in", "out", stdout=stdout, clock=clock)
    began, progress._began_s, progress.model = progress._began_s, None, ""
    progress.state = "finishing the output"
    events.show()
    progress.state = "waiting: no model"
    events.show()
    events.show()
    progress._began_s, progress.model, progress.state = began, "m", ""
    events.show()
    events.show()
    clock.now += EVERY_S
    events.show()
    events.stopping()
    events.interrupted()
    events.finished(outcome(bad_rows=2))
    told = events_in(stdout)
    assert all(event.pop("elapsed_s") == 20.0 for event in told)
    waiting, started, part, progressed, again, stopping, interrupted, finished = told
    assert waiting == {"event": "waiting", "reason": "no model"}
    assert started == {
        "event": "started",
        "input": "in",
        "output": "out",
        "model": "m",
        "rows_total": 12_000,
        "rows_resumed": 2_000,
    }
    assert part == {"event": "part", "parts": 2, "rows_committed": 6_000}
    assert progressed == {
        "event": "progress",
        "rows": 7_000,
        "rows_total": 12_000,
        "bad_rows": 0,
        "tokens": 50_000,
        "rows_per_s": 500.0,
        "tokens_per_s": 5000.0,
        "left_s": 10.0,
    }
    assert again == progressed
    assert stopping == {"event": "stopping"}
    assert interrupted == {"event": "interrupted", "rows_committed": 6_000}
    assert finished == {
        "event": "finished",
        "output": "out",
        "rows": 11_998,
        "bad_rows": 2,
        "bad_rows_file": "out.bad-rows.jsonl",
        "rows_per_s": 400.0,
    }


def test_an_event_of_failure(progress: Progress) -> None:
    stdout = io.BytesIO()
    Events(progress, "in", "out", stdout=stdout).failed(Unavailable("no Redis"), 69)
    (event,) = events_in(stdout)
    event.pop("elapsed_s")
    assert event == {"event": "failed", "error": "Unavailable", "message": "no Redis", "exit_code": 69}
