"""What a device gets done with a model, measured when the model is loaded: from it comes the token budget of a batch.

Batches grow until they are computed no faster, take too long, find too little memory, or time is up. The smallest one
about as fast as any becomes the full batch: a larger one would only let interactive work wait for longer. Measurements
are kept, so only the first start of a model takes this time, and the first request always finds predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from typing import Any

from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Dtype, Settings

from .budget import Budget
from .cost import PASS_TOKENS, CostModel
from .cpu import KERNELS_BYTES
from .device import batch_budget
from .measured import Measurements, Value
from .model import Model
from .pace import Pace
from .timing import Run, Runner, Timer

_QUERY_LENGTH, _TYPICAL_LENGTH, _LONG_LENGTH = 16, 64, 512
_SIZES = tuple(128 << doubling for doubling in range(14))
"""Tokens of the batches that are tried, up to a million. The first ones tell whether there is time for others."""
_COUNTED_SIZE = 1024
"""From so many tokens on, times tell one size from another, and attention from the rest."""
_NO_FASTER = 2
"""After so many sizes in a row that were no faster than a smaller one, none is expected to be."""
_BUSY = 1.5
"""A size that takes so many times as long as the one of half its tokens keeps the device busy. One that takes about as
long, as where kernels are launched more slowly than they run, says nothing about larger ones, however fast CUDA graphs
have made smaller ones."""
_LONG = 2
"""Sequences are long by so many times the typical length; a batch of them is expected to take as many times longer."""
_CLOSE = 0.95
"""A batch so near to the fastest, in tokens a second, is as good: the next one would be at most that much faster."""
_LEAST_TOKENS = 512
"""However slow the device: below, most of the time of a batch is none of its tokens'."""
_TOO_LITTLE = "larger batches find too little memory"
_TOO_MUCH = "larger batches take too much of the free memory"
_TOO_LARGE_PART = 0.75
"""Of a batch that has found too little memory."""
_VISIBLE = 1.02
"""Long sequences that take no longer than so many times short ones say nothing about attention: clocks are no finer."""
_LEAST_KNEE = 32
_KEPT, _NOW = "capacity", "budget"
"""Names of what is kept: what was measured, and where a running consumer has left its budget."""

log = get_logger()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is asked of a budget.

    Args:
        encoder: that computes the batches.
        max_length: of a sequence, in tokens.
        asked: the operator's own budget, in tokens; 0 for none.
        default: where nothing tells better.
        time_s: for all measurements together; 0 takes only those that predictions need.
        longest_s: of a full batch.
        memory_bytes: that a batch may take; None where nobody knows it.
    """

    encoder: str
    max_length: int
    asked: int
    default: int
    time_s: float
    longest_s: float
    memory_bytes: int | None = None

    @property
    def kept_for(self) -> dict[str, Value]:
        """What measurements must have been made for to be good here. Free memory is another each time."""
        return {name: value for name, value in asdict(self).items() if name != "memory_bytes"}


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a device gets done.

    Args:
        budget: cost of a full batch, in tokens.
        source: where that comes from, for people.
        costs: what batches cost.
        runs: measured.
    """

    budget: int
    source: str
    costs: CostModel
    runs: tuple[Run, ...] = ()

    def pace(self) -> Pace:
        """Knows the times of the batches that were measured."""
        pace = Pace(self.budget, self.costs)
        for run in self.runs:
            pace.observe(self.costs.of(run.lengths), run.tokens, run.seconds)
        return pace

    @property
    def tokens_per_s(self) -> float:
        """Of the fastest batch that was measured; 0 where none was."""
        return max((run.tokens / run.seconds for run in self.runs), default=0.0)


def find_capacity(model: Model, settings: Settings) -> Capacity:
    """Measure, or look up what was measured before.

    Args:
        model: loaded and warm.
        settings: the operator's budget, and the bounds of one that is found.
    """
    timer = Timer(model)
    timer.memory.release()  # of what loading has left
    free = timer.memory.free_bytes()
    if free is not None and model.device.type == "cpu" and model.dtype != Dtype.FLOAT32:
        free = max(0, free - KERNELS_BYTES)  # those of shapes that are still to come
    bounds = Bounds(
        encoder=model.encoder.name,
        max_length=model.recipe.max_length,
        asked=settings.batch_tokens,
        default=batch_budget(settings, model.device),
        time_s=settings.measure_ms / 1000,
        longest_s=settings.batch_latency_ms / 1000,
        memory_bytes=None if free is None else free * settings.memory_share_percent // 100,
    )
    fills_up = model.fills_up
    runs = _kept(model.measured, bounds)
    if runs is not None:
        capacity = _believed(runs, bounds, "measured before", fills_up=fills_up)
    else:
        log.info("model.measuring", at_most_s=bounds.time_s)
        capacity = _measured(timer, bounds, model.measured, fills_up=fills_up)
        timer.memory.release()  # others may want it until there is so large a batch again
    log.info(
        "model.capacity",
        batch_tokens=capacity.budget,
        batch_tokens_source=capacity.source,
        tokens_per_s=round(capacity.tokens_per_s),
        knee_tokens=capacity.costs.knee,
        pass_tokens=capacity.costs.pass_tokens,
        measured_s=round(timer.spent_s, 3),
    )
    return capacity


def running_budget(capacity: Capacity, measured: Measurements) -> Budget:
    """The budget of a consumer that starts: where the last one has left it, should that be lower.

    Args:
        capacity: as found.
        measured: told of each change.
    """
    left = measured.get(_NOW)
    now = left if isinstance(left, int) and 0 < left < capacity.budget else None
    if now is not None:
        log.info("batch.budget_lowered_before", tokens=now, full=capacity.budget)
    return Budget(capacity.budget, now, partial(measured.put, _NOW))


def measure(run: Runner, bounds: Bounds) -> Iterator[Run]:
    """A short query, batches of growing size, and one of long sequences.

    Args:
        run: runs batches.
        bounds: no batch is run that would exceed them, going by the one before it.

    Yields:
        Runs; the last may be one that found too little memory.

    Raises:
        Exception: whatever a first short query raises.
    """
    yield (before := run(min(bounds.max_length, _QUERY_LENGTH), 1))
    length, best, no_faster = min(bounds.max_length, _TYPICAL_LENGTH), 0.0, 0
    for size in _SIZES:
        tokens = min(size, bounds.asked or size)
        if not _within(before, tokens, run.spent_s, bounds):
            return
        half, before = before, run(length, max(1, tokens // length))
        yield before
        rate, busy = before.tokens / before.seconds, before.seconds > _BUSY * half.seconds
        no_faster = no_faster + 1 if size >= _COUNTED_SIZE and _CLOSE * rate <= best and busy else 0
        best = max(best, rate)
        if not before.fits or no_faster == _NO_FASTER:
            return
        long = min(bounds.max_length, _LONG_LENGTH)
        if size == _COUNTED_SIZE and long > _LONG * length and _within(before, _LONG * tokens, run.spent_s, bounds):
            yield run(long, max(1, tokens // long))
        if bounds.asked and (size >= _COUNTED_SIZE or tokens == bounds.asked):
            return  # for predictions that is enough


def _within(before: Run, tokens: int, spent_s: float, bounds: Bounds) -> bool:
    """Whether so many tokens may be run, going by the time that others took."""
    predicted_s = before.seconds * tokens / before.tokens
    if (not bounds.time_s and before.rows > 1) or _takes_too_much(before, tokens, bounds):
        return False
    return predicted_s <= bounds.longest_s and spent_s + predicted_s <= (bounds.time_s or bounds.longest_s)


def _takes_too_much(before: Run, tokens: int, bounds: Bounds) -> bool:
    """Whether so many tokens need more memory than there may be, going by what others took."""
    return bounds.memory_bytes is not None and before.peak_bytes * tokens > bounds.memory_bytes * before.tokens


def costs_of(runs: Iterable[Run], *, fills_up: bool) -> CostModel:
    """What batches cost, going by the times of some.

    Args:
        runs: as `measure` gives them.
        fills_up: whether every sequence of a batch costs as much as its longest.
    """
    fitting = _fitting(runs)
    typical = [run for run in fitting if _QUERY_LENGTH < run.length <= _TYPICAL_LENGTH]
    long = next((run for run in fitting if run.length > _TYPICAL_LENGTH), None)
    knee, pass_tokens = 0, PASS_TOKENS
    if long is not None:
        short = min(typical, key=lambda run: abs(run.tokens - long.tokens))
        slower = (long.seconds / long.tokens) / (short.seconds / short.tokens)
        if slower > _VISIBLE:  # slower = (1 + long/knee) / (1 + short/knee)
            knee = max(_LEAST_KNEE, round((long.length - slower * short.length) / (slower - 1)))
    query = next((run for run in fitting if run.rows == 1), None)
    if query is not None and len(typical) > 1:
        rate = max(run.tokens / run.seconds for run in typical)
        pass_tokens = max(0, round(query.seconds * rate) - query.tokens)
    return CostModel(fills_up, knee, pass_tokens)


def _measured(timer: Timer, bounds: Bounds, measured: Measurements, *, fills_up: bool) -> Capacity:
    runs = [*measure(timer, bounds)]
    why = "nothing was measured"
    if bounds.time_s and not timer.disturbed:
        if all(run.fits for run in runs):  # else there may be more memory at the next start: another consumer had it
            kept = {"for": bounds.kept_for, "memory_bytes": bounds.memory_bytes}
            measured.put(_KEPT, {**kept, "runs": [[*astuple(run)] for run in runs]})
        return _believed(runs, bounds, "measured", fills_up=fills_up)
    if bounds.time_s:
        why = "other programs used the processor while it was measured"
        say = log.info if bounds.asked else log.warning  # then the budget does not hang on it
        say("model.measuring_disturbed", reason=why)
    costs = CostModel(fills_up)
    if bounds.asked:
        return Capacity(bounds.asked, "asked for", costs, _fitting(runs))
    budget, source = bounds.default, f"default: {why}"
    if bounds.time_s:  # slower than it was just now it will hardly be
        cost = {run: costs.of(run.lengths) for run in runs}
        rate = max(cost[run] / run.seconds for run in _fitting(runs))
        most, reason = min(_ceilings(runs, cost, bounds, rate))
        if most < budget:
            budget, source = max(_LEAST_TOKENS, int(most)), f"{why}: {reason}"
    return Capacity(budget, source, costs, _fitting(runs))


def _believed(runs: list[Run], bounds: Bounds, found: str, *, fills_up: bool) -> Capacity:
    costs = costs_of(runs, fills_up=fills_up)
    budget, why = (bounds.asked, "") if bounds.asked else _budget_of(runs, bounds, costs)
    return Capacity(budget, f"{found}: {why}" if why else "asked for", costs, _fitting(runs))


def _fitting(runs: Iterable[Run]) -> tuple[Run, ...]:
    return tuple(run for run in runs if run.fits)


def _budget_of(runs: list[Run], bounds: Bounds, costs: CostModel) -> tuple[int, str]:
    """The budget, and why it is no larger."""
    cost = {run: costs.of(run.lengths) for run in runs}
    fitting = [run for run in _fitting(runs) if run.length <= _TYPICAL_LENGTH]
    sizes = [run for run in fitting if cost[run] >= _LEAST_TOKENS] or fitting
    rate = {run: cost[run] / run.seconds for run in sizes}
    fastest, largest = max(sizes, key=lambda run: rate[run]), max(sizes, key=lambda run: cost[run])
    enough = min(cost[run] for run in sizes if rate[run] >= _CLOSE * rate[fastest])
    budget, why = enough, "larger batches are no faster"
    if enough == cost[largest]:  # it ended while larger ones were still faster, or it could not tell
        budget, why = max(enough, bounds.default), "there was no time for larger batches"
        if 2 * largest.seconds > bounds.longest_s:
            budget, why = enough, f"larger batches take longer than {bounds.longest_s:g} s"
        elif not all(run.fits for run in runs):
            budget, why = enough, _TOO_LITTLE
        elif _takes_too_much(largest, 2 * largest.tokens, bounds):
            budget, why = max(enough, bounds.default), _TOO_MUCH  # as far as there is room
    most, reason = min(_ceilings(runs, cost, bounds, rate[fastest]))
    if most < budget:
        budget, why = int(most), reason
    return max(_LEAST_TOKENS, budget), why


def _ceilings(runs: list[Run], cost: Mapping[Run, int], bounds: Bounds, rate: float) -> Iterator[tuple[float, str]]:
    """What a budget must not exceed, and why; `rate` is the highest cost in a second."""
    yield rate * bounds.longest_s, f"larger batches take longer than {bounds.longest_s:g} s"
    largest = max(run.tokens for run in runs)
    for run in runs:
        counts = run.length > _TYPICAL_LENGTH or 2 * run.tokens >= largest  # small ones take more than their tokens do
        if not run.fits:
            yield cost[run] * _TOO_LARGE_PART, _TOO_LITTLE
        elif counts and run.peak_bytes and run.rows > 1 and bounds.memory_bytes is not None:
            yield bounds.memory_bytes * cost[run] / run.peak_bytes, _TOO_MUCH


def _kept(measured: Measurements, bounds: Bounds) -> list[Run] | None:
    """The runs of an earlier start that was asked for the same; None where there was none such.

    Nor where it had no memory for larger batches, and now there is: another program may have held it.
    """
    value: Any = measured.get(_KEPT)
    if not bounds.time_s or not isinstance(value, dict) or value.get("for") != bounds.kept_for:
        return None
    try:
        runs = [Run(*fields) for fields in value["runs"]]
        then = replace(bounds, memory_bytes=value["memory_bytes"])
        largest = max(runs, key=lambda run: run.tokens)
        short_then, short_now = (_takes_too_much(largest, 2 * largest.tokens, those) for those in (then, bounds))
    except (KeyError, TypeError, ValueError) as error:
        log.warning("measured.ignored", name=_KEPT, reason=repr(error))
        return None
    return None if short_then and not short_now else runs
