"""The picture of `make bench-engine`: throughput, and below it the time of a single query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from engine_figures import Spread, percentile
from engine_rounds import Samples

_OURS, _OTHERS = "#1b6ca8", "#9aa5b1"


def plot(
    path: Path,
    throughput: Samples,
    latency: Mapping[str, Sequence[Sequence[float]]],
    title: str,
) -> None:
    """Write a PNG.

    Args:
        path: of the file.
        throughput: tokens per second of each side and round.
        latency: seconds of single queries of each side and round.
        title: on what it was measured.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 0.8 * len(throughput) + 2.5), layout="constrained")
    names = sorted(throughput, key=lambda name: Spread.of(throughput[name]).median)
    spreads = [Spread.of(throughput[name]) for name in names]
    _bars(above, names, spreads, "{:,.0f}")
    above.set_title("Forward and pooling, sorted passages (more is better)")
    above.set_xlabel("tokens per second; lines from the least to the most of the rounds")
    order = sorted(latency, key=lambda name: -percentile([*chain.from_iterable(latency[name])], 0.5))
    _bars(below, order, [_milliseconds(latency[name]) for name in order], "{:.1f}")
    below.set_title("One short query alone (less is better)")
    below.set_xlabel("milliseconds, median; lines to the 90th percentile")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _milliseconds(rounds: Sequence[Sequence[float]]) -> Spread:
    every = [1000 * seconds for seconds in chain.from_iterable(rounds)]
    median = percentile(every, 0.5)
    return Spread(median, median, percentile(every, 0.9))


def _bars(axes: object, names: Sequence[str], spreads: Sequence[Spread], form: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    values = [spread.median for spread in spreads]
    errors = [
        [spread.median - spread.least for spread in spreads],
        [spread.most - spread.median for spread in spreads],
    ]
    colours = [_OURS if name.startswith("ours") else _OTHERS for name in names]
    axes.barh(names, values, xerr=errors, color=colours, capsize=3, ecolor="#444444")
    for place, spread in enumerate(spreads):
        axes.annotate(
            form.format(spread.median), (spread.most, place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.15 * max(spread.most for spread in spreads))
    axes.spines[["top", "right"]].set_visible(False)
