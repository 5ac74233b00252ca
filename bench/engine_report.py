"""The tables of `make bench-engine`, made of what the rounds gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from engine_figures import Setting, Spread, percentile, ratios
from engine_process import Process
from engine_rounds import Samples
from tables import table


def throughput(
    samples: Samples, settings: Mapping[str, Setting], cosines: Mapping[str, tuple[int, float]], ours: str
) -> Iterator[str]:
    """Forward and pooling."""
    rows = []
    for name, values in samples.items():
        setting = settings[name]
        compared, cosine = cosines[name]
        batch = f"{setting.budget:,}{f' ({setting.way})' if setting.way else ''}"
        nearness = "–" if not compared else f"{cosine:.6f} ({compared})"  # noqa: RUF001
        rows.append([name, batch, Spread.of(values).cell(0), ratios(samples[ours], values).cell(), nearness])
    head = ["side", "tokens of a batch", "tokens/s", f"{ours} ÷ it", "least cosine to the exact vectors (texts)"]
    yield from table(head, rows)


def rates(samples: Samples, ours: str, unit: str) -> Iterator[str]:
    """One figure for each side, and how ours stands to it."""
    yield from table(
        ["side", unit, f"{ours} ÷ it"],
        ([name, Spread.of(values).cell(0), ratios(samples[ours], values).cell()] for name, values in samples.items()),
    )


def latency(taken: Mapping[str, Sequence[Sequence[float]]], ours: str) -> Iterator[str]:
    """Single texts. Less is better."""
    middle = {name: [percentile(seconds, 0.5) for seconds in rounds] for name, rounds in taken.items()}
    rows = []
    for name, rounds in taken.items():
        every = [1000 * seconds for seconds in chain.from_iterable(rounds)]
        quantiles = [f"{percentile(every, share):.2f}" for share in (0.5, 0.9)]
        rows.append([name, *quantiles, ratios(middle[ours], middle[name]).cell()])
    yield from table(["side", "median, ms", "p90, ms", f"{ours} ÷ it, of the medians"], rows)


def by_length(samples: Mapping[int, Samples], ours: str) -> Iterator[str]:
    """Tokens per second of texts that all have one length, and how ours stands to each side."""
    names = next(iter(samples.values()))
    rows = []
    for name in names:
        cells = [name]
        for of_length in samples.values():
            share = "" if name == ours else f" ({ratios(of_length[ours], of_length[name]).median:.2f})"
            cells.append(f"{Spread.of(of_length[name]).median:,.0f}{share}")
        rows.append(cells)
    yield from table(["side", *(f"{length} tokens" for length in samples)], rows)


def notes_on_formats(sides: Mapping[str, Process], *, bfloat16: bool) -> Iterator[str]:
    """What people must know of the number formats to read the tables."""
    for name, side in sides.items():
        wanted, computed = side.choice.dtype, side.description["dtype"]
        if wanted == "auto":
            why, encoder = side.description["why"], side.description["encoder"]
            yield f"`{name}` computes in {computed}: {why}; encoder: {encoder}."
        elif wanted != computed:
            yield f"`{name}` computes in {computed} all the same: the CPU has no instructions for {wanted}."
        elif wanted == "bfloat16" and not bfloat16:
            yield f"`{name}` emulates bfloat16: the CPU has no instructions for it."


def labels(sides: Mapping[str, Process], *, bfloat16: bool) -> dict[str, str]:
    """Names of the sides for a picture, which has no notes beside it."""
    found = {}
    for name, side in sides.items():
        wanted, computed = side.choice.dtype, side.description["dtype"]
        added = f"in {computed}" if wanted != computed else "" if bfloat16 or computed == "float32" else "emulated"
        found[name] = f"{name} ({added})" if added else name
    return found


def natural(sides: Mapping[str, Process], *, bfloat16: bool) -> list[str]:
    """The sides that compute in a format that the machine has, and in the one that they were asked for."""
    kept = []
    for name, side in sides.items():
        choice, description = side.choice, side.description
        if _is_native(choice.dtype, description, bfloat16=bfloat16):
            kept.append(name)
    return kept


def _is_native(wanted: str, description: Mapping[str, Any], *, bfloat16: bool) -> bool:
    computed = description["dtype"]
    return wanted in ("auto", computed) and (computed == "float32" or bfloat16)
