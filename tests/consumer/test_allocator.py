from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedstream.consumer.allocator import give_back, keep_memory

_BATCHES = """
import resource, sys, threading
from embedstream.consumer import cpu
from embedstream.shared.settings import Settings
cpu.prepare(Settings(keep_memory_bytes=int(sys.argv[1])))
import torch

def batch():
    for _ in range(8):
        blocks = [torch.ones(mib, 1024, 256) for mib in (3, 20, 70)]
        del blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    batch()
    # The heap may still grow by a block in one of them, where something small came to lie in the midst of a free one.
    print(min(faults() for _ in range(3)))

thread = threading.Thread(target=run)  # as the device has one of its own
thread.start()
thread.join()
"""


def _faults(keep_bytes: int) -> int:
    """Pages that the system had to hand out for a batch, when another one has been before."""
    command = [sys.executable, "-c", _BATCHES, str(keep_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    return int(done.stdout)


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.skipif(_HUGE_PAGES.exists() and "[always]" in _HUGE_PAGES.read_text(), reason="pages are huge here: few")
def test_a_batch_finds_the_memory_of_the_one_before() -> None:
    assert _faults(0) > 10_000
    assert _faults(1 << 30) < 200


@pytest.mark.parametrize(
    "said", ["MALLOC_ARENA_MAX=1", "MALLOC_TRIM_THRESHOLD_=1", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"]
)
def test_what_the_operator_says_of_the_allocator_stays(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: pytest.fail("the C library was touched"))
    assert not keep_memory(1 << 30, dict([said.split("=", 1)]))
    assert not keep_memory(0, {})


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    assert not keep_memory(1 << 30, {})


def test_an_older_glibc_takes_a_lower_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []

    class Old:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            if option == -3 and value > 32 << 20:
                return 0
            taken.append((option, value))
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda _name: Old)
    assert keep_memory(1 << 30, {})
    assert taken == [(-8, 1), (-1, 1 << 30), (-3, 32 << 20)]


_LOADED = """
from embedstream.consumer import allocator, cpu
from embedstream.consumer.free_memory import resident_bytes
from embedstream.shared.settings import Settings
cpu.prepare(Settings())
import torch
before = resident_bytes()
weights = [torch.ones(1024, 1024) for _ in range(80)]
last = torch.ones(1024)  # lies behind them
del weights
print((resident_bytes() - before) >> 20)
allocator.give_back()
print((resident_bytes() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_a_model_has_left_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True, env={})
    kept, left = map(int, done.stdout.split())
    assert kept > 250  # of 320 MiB
    assert left < 60


def test_a_c_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    give_back()
