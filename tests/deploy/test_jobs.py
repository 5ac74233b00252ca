from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pytest
import redis as redis_sync
from rich.console import Console
from typer.testing import CliRunner, Result

from embedstream.deploy import cli, jobs_list
from embedstream.deploy import jobs_view as view
from embedstream.producer.backfill import registry
from embedstream.producer.backfill.beats import Beat, beats_in
from embedstream.producer.backfill.blocks import BadReason, BadRow
from embedstream.producer.backfill.drafts import host_name
from embedstream.producer.backfill.manifest import Manifest, manifest_of
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.plan import InputFile, PartId
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.state import State
from embedstream.producer.backfill.survey import survey
from embedstream.producer.request import Options
from embedstream.shared.connections import connect_sync
from embedstream.shared.keys import backfills
from embedstream.shared.processes import own_identity

COMMAND = ("embedstream", "backfill", "my texts", "out", "--redis-url", "redis://:secret@queue:6379")
LATER_MS = 2**52


@pytest.fixture(autouse=True)
def _own_registry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home))


def begun(
    folder: Path, name: str, *, ago_s: float = 0, done: int = 0, bad_rows: int = 0, complete: bool = False
) -> str:
    """Leaves a state folder as a backfill of 20 rows does; returns the backfill's id."""
    options = BackfillOptions(InputOptions("/in"), OutputOptions(f"/data/{name}"), Options(), command=COMMAND)
    files = (InputFile("/in", 1, "1", "", 20),)
    began = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat(timespec="seconds")
    manifest: Manifest = replace(
        manifest_of(options, files, pa.schema([("row", pa.int64())]), {}, 10), began=began, folder="/my work"
    )
    with closing(State(folder / name, manifest)) as state:
        for chunk in range(done):
            bad = [BadRow("/in", chunk * 10 + row, BadReason.NULL, "The text is null.") for row in range(bad_rows)]
            state.commit(PartRecord(PartId(0, chunk), 10, 10 - bad_rows, 1, 1, bad_rows), bad)
        if complete:
            state.finish()
    registry.remember(folder / name)
    return manifest.id


def beat(id_: str, pid: int | None = None, **changes: object) -> Beat:
    process = own_identity()
    said = Beat(id_, "/data/x", host_name(), pid or process.pid, process.started, 0, None, 0, 4.0, "")
    return replace(said, **changes)  # type: ignore[arg-type] # of a test


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_sync.Redis]:
    client = connect_sync(redis_url)
    yield client
    client.close()


Run = Callable[..., Result]


@pytest.fixture
def run(redis_url: str, prefix: str) -> Run:
    """The command, as a pipe sees it."""

    def invoke(*arguments: str, url: str = redis_url) -> Result:
        return CliRunner().invoke(cli.app, ["jobs", *arguments, "--redis-url", url, "--key-prefix", prefix])

    return invoke


def rows(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_without_any_backfill_it_says_so(run: Run) -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "No backfill is known on this machine, and none runs on the queue.\n"


def test_state_folders_are_listed_the_newest_first(run: Run, tmp_path: Path) -> None:
    stopped = begun(tmp_path, "stopped", ago_s=50, done=1)
    complete = begun(tmp_path, "complete", ago_s=100, done=2, complete=True)
    bad = begun(tmp_path, "bad", ago_s=10, done=2, bad_rows=3, complete=True)
    listed = rows(run("--json"))
    facts = ("id", "state", "rows_done", "rows_total", "bad_rows", "out", "rows_per_s", "left_s")
    assert [tuple(row[name] for name in facts) for row in listed] == [
        (bad, "complete", 20, 20, 6, "/data/bad", None, None),
        (stopped, "stopped", 10, 20, 0, "/data/stopped", None, None),
        (complete, "complete", 20, 20, 0, "/data/complete", None, None),
    ]
    assert listed[1]["state_folder"] == str(tmp_path / "stopped")
    resume = "cd '/my work' && embedstream backfill 'my texts' out --redis-url 'redis://:***@queue:6379'"
    assert [row["resume"] for row in listed] == [None, resume, None]


def test_a_pipe_gets_columns(run: Run, tmp_path: Path) -> None:
    bad = begun(tmp_path, "bad\tname", ago_s=10, done=2, bad_rows=3, complete=True)
    told = survey(tmp_path / "bad\tname")
    assert told is not None
    (line,) = run().stdout.splitlines()
    state, out = "complete with bad rows", r"/data/bad\tname"
    assert line.split("\t") == [bad, state, "20", "20", "", "", "6", out, told.manifest.began, ""]


def test_a_process_that_beats_in_the_folder_makes_it_run(run: Run, tmp_path: Path) -> None:
    begun(tmp_path, "newer", done=1)
    id_ = begun(tmp_path, "running", ago_s=100, done=1)
    alive, dead = beat(id_), beat(id_, started=1)
    for said in (alive, dead):
        (tmp_path / "running" / "running" / f"{said.mark}.json").write_bytes(said.encode())
    assert set(beats_in(tmp_path / "running" / "running")) == {alive.mark}
    first, second = rows(run("--json"))
    assert (first["id"], first["state"], first["rows_per_s"], first["left_s"]) == (id_, "running", 4.0, 2.5)
    assert (first["rows_done"], first["resume"]) == (10, None)
    assert second["state"] == "stopped"


def test_processes_elsewhere_are_merged_with_what_is_here(
    run: Run, redis: redis_sync.Redis, prefix: str, tmp_path: Path
) -> None:
    id_ = begun(tmp_path, "shared", done=1)
    here, there = beat(id_), beat(id_, host="elsewhere", rows_per_s=6.0, taken=20, bad_rows=2, doing="waiting")
    alone = beat("far", host="elsewhere", pid=5, taken=7, total=9)
    (tmp_path / "shared" / "running" / f"{here.mark}.json").write_bytes(here.encode())
    for said in (here, there, alone):
        redis.hset(backfills(prefix), said.mark, said.encode(LATER_MS))
    shared, far = rows(run("--json"))
    assert (shared["id"], shared["rows_per_s"], shared["rows_done"], shared["bad_rows"]) == (id_, 10.0, 20, 2)
    assert [process["host"] for process in shared["processes"]] == ["elsewhere", host_name()]  # type: ignore[attr-defined] # JSON
    assert (far["id"], far["state"], far["rows_done"], far["rows_total"]) == ("far", "running", 7, 9)
    assert (far["out"], far["began"], far["state_folder"], far["left_s"]) == ("/data/x", None, None, 0.5)
    assert "running, 2 processes (waiting)" in run().stdout


def test_a_process_that_was_killed_here_does_not_run_though_redis_still_has_its_word(
    run: Run, redis: redis_sync.Redis, prefix: str, tmp_path: Path
) -> None:
    said = beat(begun(tmp_path, "killed"), started=1)
    (tmp_path / "killed" / "running" / f"{said.mark}.json").write_bytes(said.encode())
    redis.hset(backfills(prefix), said.mark, said.encode(LATER_MS))
    assert [row["state"] for row in rows(run("--json"))] == ["stopped"]


def test_a_redis_that_is_away_hides_nothing_of_this_machine(run: Run, tmp_path: Path) -> None:
    id_ = begun(tmp_path, "stopped")
    result = run("--json", url=f"unix://:secret@{tmp_path}/nobody.sock")
    assert [row["id"] for row in rows(result)] == [id_]
    assert "does not answer" in result.stderr
    assert "secret" not in result.stderr


def test_a_damaged_state_folder_hides_no_other(run: Run, tmp_path: Path) -> None:
    id_ = begun(tmp_path, "good")
    begun(tmp_path, "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    result = run("--json")
    assert [row["id"] for row in rows(result)] == [id_]
    assert "manifest.json is damaged" in result.stderr


def test_no_server_is_needed(tmp_path: Path) -> None:
    id_ = begun(tmp_path, "stopped")
    result = CliRunner().invoke(cli.app, ["jobs", "--json"])
    assert [row["id"] for row in rows(result)] == [id_]
    assert result.stderr == ""


def test_without_pyarrow_nobody_says_that_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, "v")
    monkeypatch.setattr(jobs_list, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["jobs", "--json"])
    assert "pyarrow is not installed to look into 1 of this machine's backfills" in result.stderr
    assert "No backfill" not in result.stderr


def test_a_terminal_gets_a_table_and_the_commands_that_go_on(tmp_path: Path) -> None:
    id_ = begun(tmp_path, "stopped\x1b[31m", ago_s=3700, done=1)
    told = survey(tmp_path / "stopped\x1b[31m")
    assert told is not None
    found = jobs_list.backfills([(told, {})], {"m": beat("far", rows_per_s=2.0, total=20)})
    drawn = StringIO()
    view.print_table(jobs_list.ordered(found), Console(file=drawn, width=100, highlight=False))
    lines = drawn.getvalue().splitlines()
    assert lines[0].split() == ["id", "state", "rows", "rows/s", "left", "OUT", "age"]
    assert lines[1].split() == ["far", "running", "0", "of", "20", "2", "10", "s", "/data/x"]
    assert lines[2].split() == [id_[:8], "stopped", "10", "of", "20", r"/data/stopped\x1b[31m", "1", "h", "1", "min"]
    assert lines[-1].startswith("  cd '/my work' && embedstream backfill ")


def test_a_narrow_terminal_has_room_for_the_paths(tmp_path: Path) -> None:
    name = "passages-of-2026"
    id_ = begun(tmp_path, name, done=2, bad_rows=3, complete=True)
    told = survey(tmp_path / name)
    assert told is not None
    drawn = StringIO()
    view.print_table(jobs_list.backfills([(told, {})], {}), Console(file=drawn, width=80, highlight=False))
    header, row = (line.split() for line in drawn.getvalue().splitlines())
    assert header == ["id", "state", "rows", "bad", "rows", "OUT", "age"]
    assert row[:-2] == [id_[:8], "complete", "20", "of", "20", "6", f"/data/{name}"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_spans_are_short(seconds: float, words: str) -> None:
    assert view.span(seconds) == words
