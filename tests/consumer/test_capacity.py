from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from embedstream.consumer import capacity as module
from embedstream.consumer.capacity import Bounds, Capacity, costs_of, find_capacity, measure, running_budget
from embedstream.consumer.cost import CostModel
from embedstream.consumer.measured import Conditions, Measured
from embedstream.consumer.model import Model
from embedstream.consumer.timing import DeviceMemory, Run, Timer
from embedstream.shared.settings import Dtype, Settings

BOUNDS = Bounds("packed", 512, asked=0, default=4096, time_s=2.0, longest_s=1.0)


class FakeDevice:
    """Takes a while for each pass, for each token, and for what attention adds; twice as if it ran a batch twice.

    It gets slower again with batches that fall out of its cache.
    """

    def __init__(
        self,
        rate: float = 10_000.0,
        pass_s: float = 0.005,
        knee: float = 700.0,
        cache: int = 10**9,
        most: int = 10**9,
        bytes_of_token: int = 0,
    ) -> None:
        self.rate, self.pass_s, self.knee, self.cache = rate, pass_s, knee, cache
        self.most, self.bytes_of_token = most, bytes_of_token
        self.spent_s = 0.0
        self.runs: list[Run] = []

    def __call__(self, length: int, rows: int) -> Run:
        tokens = length * rows
        seconds = self.pass_s + tokens * (1 + length / self.knee) / self.rate * (1.5 if tokens > self.cache else 1.0)
        self.spent_s += seconds
        fits = tokens <= self.most
        self.runs.append(Run(length, rows, seconds, self.bytes_of_token * tokens if fits else 0, fits))
        return self.runs[-1]


def found(device: FakeDevice, bounds: Bounds = BOUNDS) -> Capacity:
    return module._believed([*measure(device, bounds)], bounds, "measured", fills_up=False)


def test_batches_grow_until_they_are_no_faster() -> None:
    device = FakeDevice(rate=100_000, pass_s=0.01, cache=4096)
    capacity = found(device, replace(BOUNDS, time_s=100))
    assert capacity.budget == pytest.approx(4096, rel=0.1)
    assert "no faster" in capacity.source
    sizes = [run.tokens for run in device.runs if run.length == 64]
    assert sizes == [128, 256, 512, 1024, 2048, 4096, 8192, 16384]


@pytest.mark.parametrize(("launch_s", "rate", "kernels_s"), [(0.006, 900_000, 0.0006), (0.0015, 12_000_000, 0.00025)])
def test_sizes_that_wait_for_their_launch_say_nothing_about_larger_ones(
    launch_s: float, rate: float, kernels_s: float
) -> None:
    """On a GPU whose smaller sizes are launched at once, by graphs: the next ones are slower than these."""

    class Launched(FakeDevice):
        def __call__(self, length: int, rows: int) -> Run:
            tokens = length * rows
            busy_s = kernels_s + tokens / rate
            seconds = busy_s if tokens <= 512 else max(launch_s, busy_s)
            self.spent_s += seconds
            self.runs.append(Run(length, rows, seconds))
            return self.runs[-1]

    capacity = found(Launched(), replace(BOUNDS, default=65_536))
    assert capacity.budget / (capacity.pace().predict_s(capacity.budget) or 9) > 0.9 * rate
    assert "no faster" in capacity.source


def test_of_sizes_that_are_as_fast_the_smallest_is_taken() -> None:
    assert found(FakeDevice(pass_s=0.0001)).budget == pytest.approx(512, rel=0.1)


@given(st.floats(100, 10**7), st.floats(0, 0.2), st.floats(0.1, 10), st.floats(0.01, 2))
def test_no_bound_is_exceeded(rate: float, pass_s: float, time_s: float, longest_s: float) -> None:
    bounds = replace(BOUNDS, time_s=time_s, longest_s=longest_s)
    device = FakeDevice(rate, pass_s)
    capacity = found(device, bounds)
    query, *others = device.runs
    # A short query is run in any case; each of its tokens costs a little less than those of others.
    assert sum(run.seconds for run in others) <= time_s * 1.1
    assert max((run.seconds for run in others), default=0.0) <= longest_s * 1.1
    seconds = capacity.pace().predict_s(capacity.budget)
    assert seconds is not None
    assert seconds <= longest_s * 1.1 + query.seconds or capacity.budget == 512


def test_a_full_batch_takes_no_longer_than_interactive_work_may_wait() -> None:
    capacity = found(FakeDevice(rate=20_000, pass_s=0.1), replace(BOUNDS, time_s=100))
    assert capacity.budget > BOUNDS.default
    assert "longer than 1 s" in capacity.source
    assert (capacity.pace().predict_s(capacity.budget) or 9) <= 1.0


def test_without_time_to_measure_the_default_is_taken_where_it_is_quick_enough() -> None:
    bounds = replace(BOUNDS, time_s=0.4)
    capacity = found(FakeDevice(rate=10_000, pass_s=0.03), bounds)
    assert capacity.budget == bounds.default
    assert "no time" in capacity.source
    slow = found(FakeDevice(rate=1000, pass_s=0.03), bounds)
    assert slow.budget < 1024


def test_batches_that_find_too_little_memory_are_larger() -> None:
    capacity = found(FakeDevice(rate=10**6, pass_s=0.05, most=9000))
    assert capacity.budget <= 9000
    assert "too little memory" in capacity.source
    assert all(run.fits for run in capacity.runs)  # what failed tells no time


def test_a_batch_takes_its_share_of_the_memory_alone() -> None:
    device = FakeDevice(rate=10**6, pass_s=0.05, bytes_of_token=1000)
    capacity = found(device, replace(BOUNDS, memory_bytes=2_000_000))
    assert 1500 < capacity.budget <= 2000
    assert "free memory" in capacity.source
    assert max(run.peak_bytes for run in device.runs) <= 2_000_000  # or a container would end it


def test_what_small_batches_take_beside_their_tokens_bounds_no_large_ones() -> None:
    runs = [Run(64, rows, 64 * rows / 10_000, 20_000_000 + 64_000 * rows) for rows in (2, 64, 128)]
    bounds, cost = replace(BOUNDS, memory_bytes=40_000_000), {run: run.tokens for run in runs}
    most = [value for value, why in module._ceilings(runs, cost, bounds, 10_000) if "memory" in why]
    assert min(most) == pytest.approx(40_000_000 * 4096 / 24_096_000)


def test_the_operators_budget_is_measured_no_further_than_predictions_need() -> None:
    device = FakeDevice()
    capacity = found(device, replace(BOUNDS, asked=600))
    assert (capacity.budget, capacity.source) == (600, "asked for")
    assert max(run.tokens for run in device.runs) <= 600
    device = FakeDevice()
    assert found(device, replace(BOUNDS, asked=100_000)).budget == 100_000
    assert max(run.tokens for run in device.runs) == 1024
    assert capacity.pace().predict_s(500)


def test_with_no_time_at_all_only_predictions_are_made(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]]
) -> None:
    capacity = find_capacity(*load(measure_ms=0))
    assert runs == [(16, 1), (48, 2)]
    assert (capacity.budget, capacity.source) == (4096, "default: nothing was measured")
    assert capacity.costs == CostModel(fills_up=capacity.costs.fills_up)
    assert capacity.pace().predict_s(10)


def test_on_a_busy_machine_nothing_is_believed(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Timer, "disturbed", True)
        with structlog.testing.capture_logs() as lines:
            capacity = find_capacity(*load())
            find_capacity(*load(batch_tokens=512))  # whose budget does not hang on it
    said = [line["log_level"] for line in lines if line["event"] == "model.measuring_disturbed"]
    assert said == ["warning", "info"]
    assert capacity.budget == 4096
    assert "other programs" in capacity.source
    assert capacity.costs.knee == 0
    runs.clear()
    assert find_capacity(*load()).source.startswith("measured:")
    assert runs  # nothing was kept


def test_on_a_busy_machine_a_full_batch_is_quick_enough_all_the_same(
    load: Callable[..., tuple[Model, Settings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Timer, "disturbed", True)
    monkeypatch.setattr(Timer, "_seconds", lambda self, length, rows: length * rows / 1000)
    capacity = find_capacity(*load(measure_ms=10_000))
    assert capacity.budget == 1000
    assert (
        capacity.source
        == "other programs used the processor while it was measured: larger batches take longer than 1 s"
    )
    assert find_capacity(*load(measure_ms=10_000, batch_tokens=5000)).budget == 5000


def test_what_found_too_little_memory_once_is_tried_again(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another consumer may have measured at the same time."""

    def full(self: Timer, length: int, rows: int) -> float:
        if rows > 4:
            raise MemoryError
        return 0.001

    with monkeypatch.context() as patch:
        patch.setattr(Timer, "_seconds", full)
        assert "too little memory" in find_capacity(*load(measure_ms=10_000)).source  # however busy the machine
    runs.clear()
    assert "too little memory" not in find_capacity(*load()).source
    assert runs


def test_what_had_no_memory_once_is_measured_anew_when_there_is(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have held it; and while it does, what was measured is good enough."""
    free = [40_000_000]
    monkeypatch.setattr(Timer, "_seconds", lambda self, length, rows: 0.01 + length * rows / 1_000_000)
    monkeypatch.setattr(DeviceMemory, "free_bytes", lambda _: free[0])
    monkeypatch.setattr(DeviceMemory, "peak_bytes", lambda _: runs[-1][0] * runs[-1][1] * 10_000)
    assert "free memory" in find_capacity(*load(measure_ms=10_000)).source
    runs.clear()
    find_capacity(*load(measure_ms=10_000))
    assert runs == []
    free[0] = 40_000_000_000
    assert "free memory" not in find_capacity(*load(measure_ms=10_000)).source
    assert runs
    runs.clear()
    free[0] = 40_000_000
    assert "free memory" in find_capacity(*load(measure_ms=10_000)).source  # by what was measured with plenty
    assert runs == []


@pytest.mark.parametrize(("dtype", "kept"), [(Dtype.FLOAT32, 0), (Dtype.BFLOAT16, 512 * 1024 * 1024)])
def test_in_half_formats_there_must_be_memory_for_kernels_of_other_shapes(
    load: Callable[..., tuple[Model, Settings]], monkeypatch: pytest.MonkeyPatch, dtype: Dtype, kept: int
) -> None:
    asked: list[Bounds] = []
    monkeypatch.setattr(module, "_kept", lambda _, bounds: asked.append(bounds))
    free = iter([kept + 1_000_000_000, kept // 2])
    monkeypatch.setattr(DeviceMemory, "free_bytes", lambda _: next(free))
    find_capacity(*load(dtype=dtype))
    find_capacity(*load(dtype=dtype))
    assert [bounds.memory_bytes for bounds in asked] == [800_000_000, 0]


@given(st.floats(100, 3000), st.floats(0.0001, 0.05), st.floats(5_000, 10**6))
def test_attention_is_told_from_the_rest(knee: float, pass_s: float, rate: float) -> None:
    device = FakeDevice(rate, pass_s, knee)
    runs = [*measure(device, replace(BOUNDS, time_s=1000, longest_s=1000))]
    costs = costs_of(runs, fills_up=False)
    per_pass = pass_s * rate / 1024  # it hides a part of the difference
    assert costs.knee == 0 or knee * 0.9 <= costs.knee <= (knee + 64) * (1 + per_pass) * 1.1


@pytest.mark.parametrize("knee", [100, 700, 2000])
def test_the_knee_is_where_attention_doubles_the_time(knee: int) -> None:
    runs = [*measure(FakeDevice(100_000, 0.0, knee), replace(BOUNDS, time_s=1000, longest_s=1000))]
    assert costs_of(runs, fills_up=False).knee == pytest.approx(knee, rel=0.01)


def test_what_a_pass_costs_beside_its_tokens() -> None:
    runs = [*measure(FakeDevice(rate=10_000, pass_s=0.1, knee=10**9), replace(BOUNDS, time_s=1000, longest_s=1000))]
    assert costs_of(runs, fills_up=True).pass_tokens == pytest.approx(1000, rel=0.05)


def test_models_of_short_texts_are_measured_too() -> None:
    device = FakeDevice()
    capacity = found(device, replace(BOUNDS, max_length=8))
    assert {run.length for run in device.runs} == {8}
    assert capacity.budget >= 512


@pytest.fixture
def load(tiny_bert: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Model, Settings]]:
    folder = tiny_bert()

    def make(**changes: Any) -> tuple[Model, Settings]:
        settings = Settings(
            model=str(folder),
            device="cpu",
            threads=1,
            measured_dir=tmp_path / "measured",
            **{"measure_ms": 50, "dtype": Dtype.FLOAT32, **changes},
        )
        return Model.load(settings), settings

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Batches that are run to be timed, on a machine that is never busy."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(Timer, "disturbed", False)
    run = Timer.__call__

    def watched(self: Timer, length: int, rows: int) -> Run:
        seen.append((length, rows))
        return run(self, length, rows)

    monkeypatch.setattr(Timer, "__call__", watched)
    return seen


def test_the_second_start_measures_nothing(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]]
) -> None:
    first = find_capacity(*load())
    assert runs
    runs.clear()
    with structlog.testing.capture_logs() as lines:
        second = find_capacity(*load())
    assert runs == []
    assert (second.budget, second.costs, second.runs) == (first.budget, first.costs, first.runs)
    assert (first.source.split(":")[0], second.source.split(":")[0]) == ("measured", "measured before")
    (line,) = [line for line in lines if line["event"] == "model.capacity"]
    assert (line["batch_tokens"], line["batch_tokens_source"]) == (second.budget, second.source)


@pytest.mark.parametrize("changes", [{"batch_tokens": 700}, {"max_model_len": 30}, {"batch_latency_ms": 30}])
def test_other_bounds_are_measured_anew(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]], changes: dict[str, Any]
) -> None:
    find_capacity(*load())
    runs.clear()
    find_capacity(*load(**changes))
    assert runs


@pytest.mark.parametrize(
    "spoil", [lambda _: {}, lambda value: {**value, "runs": [[1, 2]]}, lambda value: {**value, "runs": []}]
)
def test_what_is_kept_in_another_form_is_measured_anew(
    load: Callable[..., tuple[Model, Settings]], runs: list[tuple[int, int]], spoil: Callable[[Any], Any]
) -> None:
    model, settings = load()
    find_capacity(model, settings)
    model.measured.put("capacity", spoil(model.measured.get("capacity")))
    runs.clear()
    find_capacity(*load())
    assert runs


def test_a_lowered_budget_outlives_the_consumer(tmp_path: Path) -> None:
    capacity = Capacity(4096, "measured", CostModel())
    conditions = Conditions("w", "cpu", versions={})
    budget = running_budget(capacity, Measured(conditions, tmp_path))
    assert (budget.now, budget.full) == (4096, 4096)
    budget.begin()
    budget.too_large(2000, 20)
    again = running_budget(capacity, Measured(conditions, tmp_path))
    assert (again.now, again.full) == (1500, 4096)
    for _ in range(1000):
        again.begin()
        again.end()
    assert again.now == 4096
    assert running_budget(capacity, Measured(conditions, tmp_path)).now == 4096
    assert running_budget(replace(capacity, budget=100), Measured(conditions, tmp_path)).now == 100
