from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedstream.consumer import cgroups, cpu
from embedstream.consumer.cpu import Cores, thread_count, usable_cores
from embedstream.shared.settings import Settings

linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 16 CPUs in 8 cores, as Linux shows it, without any limit."""
    for number in range(16):
        topology = tmp_path / "topology" / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 8},{number % 8 + 8}\n")
    (tmp_path / "cgroup" / "cpu").mkdir(parents=True)
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    monkeypatch.setattr(cpu, "_TOPOLOGY", tmp_path / "topology")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    return tmp_path


@linux
def test_two_cpus_of_a_core_are_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == Cores(16, 8, None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 8})
    assert usable_cores() == Cores(4, 3, None)


@linux
def test_where_cores_are_hidden_each_cpu_is_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_TOPOLOGY", machine / "nothing")
    assert usable_cores() == Cores(16, 16, None)


@linux
@pytest.mark.parametrize(
    ("text", "quota", "useful"),
    [("max 100000", None, 8), ("250000 100000", 2.5, 2), ("50000 100000", 0.5, 1), ("9900000 100000", 99, 8)],
)
def test_a_container_limits_the_cores(machine: Path, text: str, quota: float | None, useful: int) -> None:
    (machine / "cgroup" / "cpu.max").write_text(f"{text}\n")
    assert usable_cores() == Cores(16, 8, quota)
    assert usable_cores().useful == useful


@linux
@pytest.mark.parametrize(("quota", "useful"), [("-1", 8), ("200000", 2)])
def test_an_older_container_too(machine: Path, quota: str, useful: int) -> None:
    (machine / "cgroup" / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (machine / "cgroup" / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores().useful == useful


@linux
def test_the_strictest_group_counts(machine: Path) -> None:
    """As under systemd, where a service's own group is below the one of all services."""
    service = machine / "cgroup" / "system.slice" / "embedstream.service"
    service.mkdir(parents=True)
    (machine / "own").write_text("0::/system.slice/embedstream.service\n")
    (service / "cpu.max").write_text("600000 100000\n")
    assert usable_cores().quota == 6
    (service.parent / "cpu.max").write_text("300000 100000\n")
    assert usable_cores().quota == 3


@linux
def test_groups_of_older_systems_are_found_by_their_controllers(machine: Path) -> None:
    group = machine / "cgroup" / "cpu" / "docker" / "1a"
    group.mkdir(parents=True)
    (machine / "own").write_text("7:memory:/elsewhere\n4:cpu,cpuacct:/docker/1a\n")
    (group / "cpu.cfs_quota_us").write_text("400000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores().quota == 4


def test_threads_are_shared_between_the_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "usable_cores", lambda: Cores(16, 8, None))
    assert thread_count(Settings(threads=3, consumers=7)) == 3
    assert thread_count(Settings(consumers=2)) == 4
    assert thread_count(Settings(consumers=256)) == 1
    assert thread_count(Settings(consumers=0)) == 8


@pytest.mark.parametrize(("said", "threads"), [("5", 5), ("3,2", 3), (" 2 ", 2), ("", 4), ("0", 4), ("all", 4)])
def test_openmps_own_variable_counts(said: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "usable_cores", lambda: Cores(16, 8, None))
    assert thread_count(Settings(consumers=2), {"OMP_NUM_THREADS": said}) == threads
    assert thread_count(Settings(consumers=2, threads=7), {"OMP_NUM_THREADS": said}) == 7


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_threads_wait_as_the_operator_says(name: str) -> None:
    environment = {name: "operator's"}
    cpu.prepare(Settings(keep_memory_bytes=0), environment)
    kernels = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "64"}
    assert environment == {name: "operator's", **kernels}
    environment |= dict.fromkeys(kernels, "7")
    cpu.prepare(Settings(keep_memory_bytes=0), environment)
    assert environment == {name: "operator's", **dict.fromkeys(kernels, "7")}


@linux
def test_openmp_is_told_before_torch_brings_it() -> None:
    code = (
        "import sys\n"
        "from embedstream.consumer import cpu\n"
        "from embedstream.shared.settings import Settings\n"
        "assert 'torch' not in sys.modules\n"
        "cpu.prepare(Settings())\n"
        "import torch\n"
    )
    environment = {"OMP_DISPLAY_ENV": "verbose", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr or "KMP_BLOCKTIME='1'" in done.stderr
