from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from embedstream.deploy.metrics_folder import MetricsFolder
from embedstream.shared import metrics, runfile
from embedstream.shared.metric_files import FOLDER_VARIABLE, PROCESS_VARIABLE

pytestmark = pytest.mark.usefixtures("home")

WORK = """
from embedstream.shared import metrics
metrics.REQUESTS.labels("bulk", "ok").inc({count})
metrics.DUPLICATES.inc({count})
metrics.REQUEST_SECONDS.labels("bulk").observe(0.2)
metrics.UNDELIVERED_BYTES.inc({count})
metrics.LANE_JOBS.labels("bulk").set_to_current_time()
"""


def work(folder: MetricsFolder, child: str, count: int, code: str = WORK) -> str:
    environment = {**os.environ, FOLDER_VARIABLE: "/of/the/user", **folder.variables_of(child)}
    command = [sys.executable, "-c", code.format(count=count)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def shown(folder: MetricsFolder, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What any process of the folder would show, by name and labels."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder.path))
    lines = generate_latest(metrics.registry()).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_processes_add_up_and_only_live_gauges_go_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MetricsFolder()
    for child, count in (("api 1", 1), ("api 2", 10)):
        work(folder, child, count)
    found = shown(folder, monkeypatch)
    assert found['embedstream_requests_total{lane="bulk",outcome="ok"}'] == 11
    assert found['embedstream_request_seconds_bucket{lane="bulk",le="0.25"}'] == 2
    assert found['embedstream_request_seconds_count{lane="bulk"}'] == 2
    assert found["embedstream_undelivered_bytes"] == 11
    newest = found['embedstream_lane_jobs{lane="bulk"}']

    folder.ended("api 1")
    found = shown(folder, monkeypatch)
    assert found['embedstream_requests_total{lane="bulk",outcome="ok"}'] == 11
    assert found["embedstream_undelivered_bytes"] == 10
    assert found['embedstream_lane_jobs{lane="bulk"}'] == newest


def test_a_restarted_child_counts_on_in_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MetricsFolder()
    work(folder, "api 1", 5)
    files = set(folder.path.iterdir())
    assert len(files) == 4
    for start in range(1, 4):
        folder.ended("api 1")
        work(folder, "api 1", 1)
        found = shown(folder, monkeypatch)
        assert found["embedstream_duplicate_parts_total"] == 5 + start
        assert found["embedstream_undelivered_bytes"] == 1
    assert set(folder.path.iterdir()) == files


def test_a_fork_and_what_a_child_starts_write_to_files_of_their_own() -> None:
    folder = MetricsFolder()
    code = (
        "import os, subprocess, sys; from embedstream.shared import metrics; metrics.DUPLICATES.inc()\n"
        "pid = os.fork()\n"
        "if not pid: metrics.DUPLICATES.inc(); os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "subprocess.run([sys.executable, '-c', 'from embedstream.shared import metrics'], check=True)"
    )
    work(folder, "api 1", 0, code)
    names = sorted(path.name for path in folder.path.glob("counter_*"))
    assert len(names) == 3
    assert re.fullmatch(r"counter_\d+\.db", names[0])
    assert re.fullmatch(r"counter_api-1-\d+\.db", names[1])
    assert names[2] == "counter_api-1.db"


def test_a_file_that_is_empty_for_a_moment_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MetricsFolder()
    work(folder, "api 1", 2)
    (folder.path / "counter_api-2.db").touch()
    assert shown(folder, monkeypatch)["embedstream_duplicate_parts_total"] == 2


def test_the_folder_is_private_and_swept_by_its_name_once_its_owner_is_dead() -> None:
    folder = MetricsFolder()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert runfile.sweep() == []
    folder.remove()
    assert not folder.path.exists()
    folder.remove()
    code = "from embedstream.deploy.metrics_folder import MetricsFolder; print(MetricsFolder().path)"
    left = Path(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    assert left.is_dir()
    assert runfile.sweep() == [left]
    assert not left.exists()


def test_the_supervisor_defines_no_metrics_and_writes_no_files(tmp_path: Path) -> None:
    code = "import sys, embedstream.deploy.local; print('embedstream.shared.metrics' in sys.modules)"
    environment = {**os.environ, FOLDER_VARIABLE: str(tmp_path), PROCESS_VARIABLE: "x"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
    assert list(tmp_path.iterdir()) == []
