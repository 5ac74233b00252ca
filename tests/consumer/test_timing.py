from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from numpy.typing import NDArray

from embedstream.consumer import free_memory
from embedstream.consumer.free_memory import forget_peak
from embedstream.consumer.model import Model
from embedstream.consumer.timing import DeviceMemory, Run, Timer


class Memory(DeviceMemory):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.asked: list[str] = []

    def begin(self) -> None:
        self.asked.append("begin")

    def peak_bytes(self) -> int:
        self.asked.append("peak")
        return 1234

    def release(self) -> None:
        self.asked.append("release")


@pytest.fixture
def forward_in_little_memory(minilm: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Lets the forward pass of more than so many rows fail with some words."""

    def limit(most: int, words: str) -> None:
        forward = minilm.forward

        def limited(ids: NDArray[Any], lengths: NDArray[Any], adapter: str = "") -> torch.Tensor:
            if len(lengths) > most:
                raise RuntimeError(words)
            return forward(ids, lengths, adapter)

        monkeypatch.setattr(minilm, "forward", limited)

    return limit


def test_a_batch_is_run_and_timed(minilm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[int], str]] = []
    forward = minilm.forward

    def watched(ids: NDArray[Any], lengths: NDArray[Any], adapter: str = "") -> torch.Tensor:
        seen.append((len(ids), lengths.tolist(), adapter))
        return forward(ids, lengths, adapter)

    monkeypatch.setattr(minilm, "forward", watched)
    memory = Memory()
    timer = Timer(minilm, memory)
    run = timer(8, 3)
    assert set(map(str, seen)) == {str((24, [8, 8, 8], ""))}
    assert (run.length, run.rows, run.tokens, run.lengths.tolist(), run.fits) == (8, 3, 24, [8, 8, 8], True)
    assert run.peak_bytes == 1234
    assert 0 < run.seconds <= timer.spent_s
    assert memory.asked == ["begin", "peak"]


def test_a_batch_above_the_memory_is_no_reason_not_to_serve(
    minilm: Model, forward_in_little_memory: Callable[[int, str], None]
) -> None:
    forward_in_little_memory(1, "CUDA error: out of memory")
    memory = Memory()
    with structlog.testing.capture_logs() as lines:
        run = Timer(minilm, memory)(8, 2)
    assert (run.fits, run.tokens) == (False, 16)
    assert ("model.batch_too_large", 16) in [(line["event"], line.get("tokens")) for line in lines]
    assert memory.asked == ["begin", "release"]


@pytest.mark.parametrize(("most", "words"), [(0, "out of memory"), (1, "a defect")])
def test_what_else_fails_at_first_is_told(
    minilm: Model, forward_in_little_memory: Callable[[int, str], None], most: int, words: str
) -> None:
    forward_in_little_memory(most, words)
    with pytest.raises(RuntimeError, match=words):
        Timer(minilm)(8, 1 + most)


@pytest.mark.parametrize("fields", [(0, 1, 0.1), (1, 0, 0.1), (1, 1, 0.0), (1, 1, 0.1, -1), (1, 1, float("nan"))])
def test_runs_that_there_cannot_be(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="no batch of"):
        Run(*fields)


def test_on_a_cpu_the_kernel_counts_memory() -> None:
    if not forget_peak():
        pytest.skip("this kernel counts no peaks anew")
    memory = DeviceMemory(torch.device("cpu"))
    memory.release()  # what tests before this one left in the heap would take the block without growing
    memory.begin()
    block = torch.ones(64, 1024, 1024)  # 256 MiB
    del block
    assert 128 << 20 < memory.peak_bytes() < 512 << 20  # what was there before may have been given back meanwhile
    memory.release()
    memory.begin()
    assert memory.peak_bytes() < 64 << 20
    assert (memory.free_bytes() or 0) > 64 << 20


def test_where_no_kernel_counts_memory_it_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(free_memory, "_OWN", tmp_path / "nothing")
    memory = DeviceMemory(torch.device("cpu"))
    memory.begin()
    assert memory.peak_bytes() == 0


@pytest.mark.parametrize(("own_s", "disturbed"), [(0.9, False), (0.3, True)])
def test_a_thread_that_waits_for_the_processor_is_disturbed(
    minilm: Model, monkeypatch: pytest.MonkeyPatch, own_s: float, disturbed: bool
) -> None:
    clocks = {"perf_counter": 1.0, "thread_time": own_s}
    now = dict.fromkeys(clocks, 0.0)

    def clock(name: str) -> Callable[[], float]:
        def tick() -> float:
            now[name] += clocks[name]
            return now[name]

        return tick

    timer = Timer(minilm)
    assert not timer.disturbed
    with monkeypatch.context() as patch:
        for name in clocks:
            patch.setattr(time, name, clock(name))
        patch.setattr(timer, "_seconds", lambda length, rows: 1.0)
        timer(8, 1)
    assert timer.disturbed is disturbed
