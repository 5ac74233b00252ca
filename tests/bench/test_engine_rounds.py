from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import engine
import engine_rounds
import numpy as np
import pytest
from engine_figures import Setting
from engine_process import SideFailed, Work
from engine_rounds import Bench
from engine_sides import Choice
from engine_texts import Set

from .sums import Sums


class InThisProcess:
    """A side as `Process` shows it."""

    def __init__(self, choice: Choice, folder: Path, given: Mapping[str, Any]) -> None:
        if choice.library == "openvino" and choice.dtype == "bfloat16":
            raise SideFailed(f"{choice.name}: no module of that name")
        self.choice = choice
        self.side = Sums()
        self.asked: list[str] = []
        self.description = {"dtype": "float32", "why": "a test", "encoder": "sums", "ways": self.side.ways}
        self._work = Work(self.side, folder)

    def ask(self, what: str, **arguments: Any) -> Any:
        self.asked.append(what)
        return getattr(self._work, what)(**arguments)

    def close(self) -> None:
        self.asked.append("close")


def texts(lengths: list[int]) -> Set:
    ordered = np.array(sorted(lengths, reverse=True))
    return Set(np.arange(ordered.sum(), dtype=np.uint32), ordered, tuple(f"text {length}" for length in ordered))


SETS = {
    "passages": texts([*range(20, 220)]),
    "mixed": texts([3, 4, 5, 30]),
    "queries": texts([4, 5]),
    "16 tokens": texts([16] * 50),
}
OPTIONS = Namespace(model="m", device="cpu", threads=1, prepare_all=False, encoders=[], sides=[])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(engine_rounds, "Process", InThisProcess)
    bench = Bench(tmp_path, SETS, seconds=0.001, rounds=3)
    yield bench
    bench.close()


def test_a_run_has_all_tables_and_notes(bench: Bench) -> None:
    found = engine.Found()
    text = "\n".join(engine.measure(bench, OPTIONS, found))
    assert "\nLeft out: openvino bfloat16: no module of that name.\n" in text
    for heading in ("Forward pass", "From text", "Short queries", "One query", "Texts of one length"):
        assert f"\n### {heading}" in text, heading
    assert "4 queries, mean 10.5 tokens, the longest 30." in text
    assert "| ours auto padded |" in text
    assert "| side | 16 tokens |" in text
    assert {*map(len, found.throughput.values())} == {3}
    assert {*map(len, found.latency.values())} == {3}
    assert {*found.throughput} == {*found.latency} == {*found.labels}
    rows = [line for line in text.splitlines() if line.startswith("| openvino float32 |")]
    assert " 1.000000 (" in rows[0]  # the same numbers, so the same vectors


def test_without_the_side_that_all_is_compared_with_there_is_no_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "EXACT", Choice("openvino", "bfloat16"))
    with pytest.raises(SystemExit, match="openvino bfloat16 cannot be loaded"):
        next(engine.measure(bench, OPTIONS, engine.Found()))


def test_a_side_computes_the_same_batches_in_each_round(bench: Bench) -> None:
    bench.start([engine.OURS, engine.EXACT], {})
    bench.search([*bench.sides], "passages")
    side = bench.sides[engine.OURS.name]
    assert isinstance(side, InThisProcess)
    for name, found in bench.settings.items():
        bench.settings[name] = Setting(found.way, 512, 1e9)  # so fast that it computes all of the set's batches
    side.side.ran.clear()
    samples = bench.throughput([*bench.sides], "passages")
    assert [*map(len, samples.values())] == [3, 3]
    warm, whole = side.side.ran[::2], side.side.ran[1::2]
    assert len(warm) == len(whole) == 4  # one of them warms up
    assert len(whole[0][0]) > 1
    assert all(ran == whole[0] for ran in whole)
    assert all(ran == (whole[0][0][:1], whole[0][1]) for ran in warm)


def test_what_is_timed_follows_something_that_is_not(bench: Bench) -> None:
    """In its turn a side does a little first, so that nothing it has lost while it slept is timed."""
    asked: list[tuple[str, bool]] = []
    values = iter(range(100))

    def run(name: str, warm: bool) -> float:
        asked.append((name, warm))
        return next(values)

    assert bench._in_turns(["a", "b"], run, "") == {"a": [5, 11, 13], "b": [7, 9, 15]}
    assert asked[4:12] == [(name, warm) for name in ("a", "b", "b", "a") for warm in (True, False)]


def test_the_search_tries_every_way_of_a_side(bench: Bench) -> None:
    bench.start([engine.OURS], {})
    bench.search([engine.OURS.name], "passages")
    side = bench.sides[engine.OURS.name]
    assert isinstance(side, InThisProcess)
    assert {way for _, way in side.side.ran} == {*Sums.ways}
    assert bench.settings[engine.OURS.name].way in Sums.ways


def test_a_side_with_other_vectors_is_found_out(bench: Bench, tmp_path: Path) -> None:
    bench.start([engine.OURS, engine.EXACT], {})
    bench.search([*bench.sides], "passages")
    bench.throughput([*bench.sides], "passages", save="vectors")
    file = tmp_path / f"vectors-{engine.OURS.name}.npz"
    with np.load(file) as arrays:
        places, vectors = arrays["places"], arrays["vectors"]
    np.savez(file, places=places, vectors=-vectors)
    found = bench.cosines([*bench.sides], engine.EXACT.name, "passages", "vectors")
    assert found[engine.OURS.name][1] == pytest.approx(-1)
    assert found[engine.EXACT.name][1] == pytest.approx(1)
