"""How much memory there is for a copy of a model's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedstream.consumer import cgroups, free_memory
from embedstream.consumer.free_memory import float32_bytes, forget_peak, free_bytes, peak_bytes, resident_bytes
from embedstream.consumer.model import Model
from embedstream.shared.settings import Dtype, Settings

CPU = torch.device("cpu")
GIB = 1024**3
KIB_OF_2_GIB = 2 * 1024**2


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a kernel; each name that is left out is a file that is not there."""
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:  {KIB_OF_2_GIB} kB\n\nHugePages_Total: 0\n")
    return tmp_path


def container(machine: Path, limit: str) -> None:
    for name, text in {"memory.max": f"{limit}\n", "memory.current": f"{GIB}\n"}.items():
        (machine / name).write_text(text)


def test_of_a_machine(machine: Path) -> None:
    assert free_bytes(CPU) == 2 * GIB
    container(machine, "max")
    assert free_bytes(CPU) == 2 * GIB


def test_of_a_container(machine: Path) -> None:
    container(machine, str(GIB + GIB // 2))
    assert free_bytes(CPU) == GIB // 2
    (machine / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")  # the kernel drops these
    assert free_bytes(CPU) == GIB + GIB // 2


def test_of_a_service_below_others(machine: Path) -> None:
    service = machine / "system.slice" / "embedstream.service"
    service.mkdir(parents=True)
    (machine / "own").write_text("0::/system.slice/embedstream.service\n")
    container(service, str(GIB + GIB // 2))
    assert free_bytes(CPU) == GIB // 2
    container(service.parent, str(GIB + GIB // 4))
    assert free_bytes(CPU) == GIB // 4


def test_of_an_older_container(machine: Path) -> None:
    group = machine / "memory"
    group.mkdir()
    (group / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert free_bytes(CPU) == 2 * GIB
    (group / "memory.limit_in_bytes").write_text(f"{GIB + GIB // 2}\n")
    (group / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 5\n")
    assert free_bytes(CPU) == GIB // 2 + 5


def test_of_a_container_larger_than_its_machine(machine: Path) -> None:
    container(machine, str(64 * GIB))
    assert free_bytes(CPU) == 2 * GIB


def test_nobody_can_tell(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("meta")) is None


def test_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    assert free_bytes(torch.device("cuda")) == 3 * GIB


def test_bytes_in_float32(tiny_bert: Callable[..., Path]) -> None:
    """Whatever format the file has them in."""
    folder = tiny_bert()
    model = Model.load(Settings(model=str(folder), dtype=Dtype.FLOAT32, device="cpu", threads=1))
    pooler = 32 * 32 + 32  # in the file, though nothing here reads it
    assert float32_bytes(folder) == 4 * (model.n_parameters + pooler)


def test_what_this_process_takes() -> None:
    if not forget_peak():
        pytest.skip("this kernel counts no peaks anew")
    before = resident_bytes()
    block = torch.ones(64, 1024, 1024)  # 256 MiB
    del block
    assert 250 << 20 < peak_bytes() - before < 512 << 20
    assert forget_peak()
    assert peak_bytes() - resident_bytes() < GIB // 16


def test_a_kernel_that_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(free_memory, "_OWN", tmp_path / "nothing")
    assert not forget_peak()
    assert (resident_bytes(), peak_bytes()) == (0, 0)
