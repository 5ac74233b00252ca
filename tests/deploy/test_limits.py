from __future__ import annotations

from pathlib import Path

import pytest

from embedstream.deploy import limits


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_limits_the_memory(cgroup: Path, name: str) -> None:
    machine = limits.memory_limit_bytes()
    (cgroup / name).write_text("max\n")
    assert limits.memory_limit_bytes() == machine
    (cgroup / name).write_text("1000000\n")
    assert limits.memory_limit_bytes() == 1_000_000
