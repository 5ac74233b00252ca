"""Which consumer gets which GPU, on machines that are described here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedstream.deploy import gpus
from embedstream.deploy.gpus import VISIBLE, listed, placed, places, visible
from embedstream.shared.settings import Settings

TWO = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
"""
CUT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
  MIG 3g.20gb     Device  0: (UUID: MIG-1111)
  MIG 3g.20gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)
"""

Machine = Callable[[str], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Makes a machine whose `nvidia-smi -L` prints something, with a torch that has CUDA."""

    def make(text: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && cat <<'END'\n{text}END\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(gpus, "version", lambda _: "2.13.0")
        monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "none")

    return make


def test_auto_is_one_consumer_for_each_gpu(machine: Machine) -> None:
    machine(TWO)

    settings, found = placed(Settings(), {})

    assert settings.consumers == 2
    assert found == [{VISIBLE: "GPU-aaaa"}, {VISIBLE: "GPU-bbbb"}]


def test_parts_of_a_gpu_are_gpus_and_what_is_whole_stays_whole() -> None:
    assert listed(CUT) == ["MIG-1111", "MIG-2222", "GPU-bbbb"]
    assert listed("No devices found.\n") == []


def test_only_what_cuda_may_see_counts(machine: Machine) -> None:
    machine(CUT)

    assert visible({VISIBLE: "MIG-2222, GPU-bbbb"}) == ["MIG-2222", "GPU-bbbb"]
    assert visible({VISIBLE: "1,0"}) == ["1", "0"]
    assert visible({VISIBLE: "0,-1,1"}) == ["0"]
    assert visible({VISIBLE: "2,3,1"}) == ["2"]  # there are three, and CUDA stops at what is not there
    assert visible({VISIBLE: ""}) == []
    assert visible({VISIBLE: "0,0"}) == []


def test_a_number_of_consumers_goes_round_the_gpus(machine: Machine) -> None:
    machine(TWO)

    assert [place[VISIBLE] for place in places(Settings(consumers=3), {})] == ["GPU-aaaa", "GPU-bbbb", "GPU-aaaa"]
    assert places(Settings(consumers=0), {}) == []


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_that_was_chosen_is_the_device_of_all(machine: Machine, device: str) -> None:
    machine(TWO)

    assert places(Settings(device=device), {}) == [{}]
    assert places(Settings(device=device, consumers=2), {}) == [{}, {}]
    assert len(places(Settings(device="cuda"), {})) == 2


def test_one_gpu_or_none_is_one_consumer_that_looks_for_itself(machine: Machine) -> None:
    for text in ("", TWO.splitlines()[0] + "\n"):
        machine(text)
        assert placed(Settings(), {})[0].consumers == 1
        assert places(Settings(), {}) == [{}]


def test_a_torch_without_cuda_has_no_use_for_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(TWO)
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0+cpu")

    assert places(Settings(), {}) == [{}]


def test_without_the_program_the_drivers_folder_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path)
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0")
    monkeypatch.setenv("PATH", str(tmp_path))

    assert visible({}) == ["0", "1"]


def test_a_program_that_fails_is_told_and_passed_over(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine("")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")

    assert visible({}) == []
    assert "gpus.not_listed" in caplog.text


def test_the_word_auto_is_a_setting_like_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CONSUMERS", "auto")
    assert Settings().consumers is None
    monkeypatch.setenv("EMBEDSTREAM_CONSUMERS", "3")
    assert Settings().consumers == 3
