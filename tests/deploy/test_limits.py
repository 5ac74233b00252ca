from __future__ import annotations

from pathlib import Path

import pytest

from embedstream.deploy import limits


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("memory", "cpu"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    return tmp_path


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_limits_the_memory(cgroup: Path, name: str) -> None:
    machine = limits.memory_limit_bytes()
    (cgroup / name).write_text("max\n")
    assert limits.memory_limit_bytes() == machine
    (cgroup / name).write_text("1000000\n")
    assert limits.memory_limit_bytes() == 1_000_000


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 16), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 16)]
)
def test_a_container_limits_the_cores(cgroup: Path, text: str, cores: int) -> None:
    (cgroup / "cpu.max").write_text(f"{text}\n")
    assert limits.available_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("200000", 2)])
def test_an_older_container_too(cgroup: Path, quota: str, cores: int) -> None:
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (cgroup / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.available_cores() == cores
