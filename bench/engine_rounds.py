"""The measurements of `make bench-engine`: sides take turns, and each computes for about the same time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from engine_figures import Setting, agree_where_both, batches_for, best, goes_on, turns
from engine_process import Process, SideFailed
from engine_sides import Choice, Matrix
from engine_texts import Set, spread
from numpy.typing import NDArray

Samples = dict[str, list[float]]
BUDGETS = tuple(512 * 2**step for step in range(9))
_COMPARED = 64
"""Texts of each side that are compared with the exact ones: more cost the exact side its time."""
_SHARE_OF_SEARCH = 4
"""A trial of the search takes this part of a round's time."""
_SHARE_OF_WARMING = 4
"""Single queries that warm up a side before its turn take this part of the turn."""


class Bench:
    """Sides and sets.

    Args:
        folder: for the sets, and what sides leave there.
        sets: by name.
        seconds: that a side computes in one round.
        rounds: of each measurement.
    """

    def __init__(self, folder: Path, sets: Mapping[str, Set], seconds: float, rounds: int) -> None:
        self.sets = sets
        self.seconds = seconds
        self.rounds = rounds
        self.sides: dict[str, Process] = {}
        self.settings: dict[str, Setting] = {}
        self.notes: list[str] = []
        self._folder = folder
        self._started_s = time.monotonic()
        for name, some in sets.items():
            some.save(folder / f"{name}.npz")

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started_s

    def tell(self, what: str) -> None:
        """Progress, for people."""
        print(f"[{self.elapsed_s:4.0f} s] {what}", file=sys.stderr, flush=True)

    def start(self, choices: Iterable[Choice], given: Mapping[str, Any]) -> None:
        """Load sides, one after another; those that cannot be are noted and left out."""
        for choice in choices:
            try:
                side = self.sides[choice.name] = Process(choice, self._folder, given)
            except SideFailed as error:
                self.notes.append(f"Left out: {error}.")
                self.tell(self.notes[-1])
                continue
            self.tell(f"{choice.name} loaded: {side.description}")

    def close(self) -> None:
        """End all sides."""
        for side in self.sides.values():
            side.close()

    def search(self, names: Iterable[str], of: str) -> None:
        """Find each side's way to work and size of batches."""
        for name in names:
            side, tried = self.sides[name], []
            for way in side.description["ways"]:
                tried += self._search_way(side, of, way)
            self.settings[name] = best(tried)
            shown = ", ".join(f"{one.way + ' ' if one.way else ''}{one.budget:,}: {one.rate:,.0f}" for one in tried)
            self.tell(f"{name}: tokens/s by batch {shown}")

    def _search_way(self, side: Process, of: str, way: str) -> list[Setting]:
        tried: list[Setting] = []
        for budget in BUDGETS:
            found = side.ask("calibrate", of=of, budget=budget, way=way, seconds=self.seconds / _SHARE_OF_SEARCH)
            tried.append(Setting(way, budget, found["tokens"] / found["seconds"]))
            if not goes_on(tried, found["batch_s"], self.seconds / _SHARE_OF_SEARCH):
                break
        return tried

    def throughput(self, names: list[str], of: str, share: float = 1.0, save: str = "") -> Samples:
        """Tokens per second of forward and pooling, by side and round.

        Args:
            names: of the sides.
            of: set.
            share: of a round's time.
            save: part of the names of the files that take the vectors; "" for none.
        """
        asked = {name: self._batches(name, of, share) for name in names}
        for name in names if save else ():
            self.sides[name].ask("run", **asked[name], save=f"{save}-{name}.npz")

        def run(name: str, warm: bool) -> float:
            batches = asked[name]["batches"]
            found = self.sides[name].ask("run", **asked[name] | {"batches": batches[:1] if warm else batches})
            return float(found["tokens"] / found["seconds"])

        return self._in_turns(names, run, f"{of}, tokens/s")

    def _batches(self, name: str, of: str, share: float) -> dict[str, Any]:
        setting, some = self.settings[name], self.sets[of]
        count = len(some.batches(setting.budget))
        most = batches_for(share * self.seconds, setting.rate, len(some.ids), count)
        return {"of": of, "budget": setting.budget, "way": setting.way, "batches": spread(count, most)}

    def one_batch(self, names: list[str], of: str) -> Samples:
        """Texts per second of a whole set in one batch."""

        def run(name: str, warm: bool) -> float:
            del warm
            way = self.sides[name].description["ways"][0]
            found = self.sides[name].ask("run", of=of, budget=0, way=way, batches=[0])
            return float(found["texts"] / found["seconds"])

        return self._in_turns(names, run, f"{of} in one batch, texts/s")

    def embedding(self, names: list[str], of: str, share: float) -> Samples:
        """Texts per second, tokenisation included."""
        some, asked = self.sets[of], {}
        for name in names:
            setting = self.settings[name]
            count = max(8, round(share * self.seconds * setting.rate * len(some) / len(some.ids)))
            places = np.random.default_rng(7).permutation(spread(len(some), count)).tolist()
            asked[name] = {"of": of, "budget": setting.budget, "way": setting.way, "places": places}

        def run(name: str, warm: bool) -> float:
            places = asked[name]["places"]
            found = self.sides[name].ask("embed", **asked[name] | {"places": places[:8] if warm else places})
            return float(found["texts"] / found["seconds"])

        return self._in_turns(names, run, f"{of}, text to vector, texts/s")

    def latency(self, names: list[str], of: str, share: float) -> dict[str, list[list[float]]]:
        """Seconds of single texts, by side and round."""
        taken: dict[str, list[list[float]]] = {name: [] for name in names}

        def run(name: str, warm: bool) -> float:
            way = self.sides[name].description["ways"][0]
            for_s = share * self.seconds / (_SHARE_OF_WARMING if warm else 1)
            seconds = self.sides[name].ask("latency", of=of, way=way, seconds=for_s)
            if not warm:
                taken[name].append(seconds)
            return 1000 * float(np.median(seconds))

        self._in_turns(names, run, f"{of} alone, ms")
        return {name: rounds[1:] for name, rounds in taken.items()}  # the first one warmed up

    def _in_turns(self, names: list[str], run: Callable[[str, bool], float], what: str) -> Samples:
        """A round that warms up, then those that count.

        In these each side is warmed up again before its turn: what it had in caches others have taken, and a virtual
        machine may have lent the memory of processes that slept.
        """
        samples: Samples = {name: [] for name in names}
        for number in range(-1, self.rounds):
            for name in turns(names, number):
                run(name, True)
                value = run(name, False)
                if number >= 0:
                    samples[name].append(value)
            if number < 0:
                continue
            shown = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in samples.items())
            self.tell(f"{what}, round {number + 1} of {self.rounds}: {shown}")
        return samples

    def cosines(self, names: list[str], exact: str, of: str, save: str) -> dict[str, tuple[int, float]]:
        """How many texts were compared with those of the exact side, and their least cosine.

        Args:
            names: of the sides that have saved vectors.
            exact: the side that is compared with.
            of: set.
            save: as `throughput` had it.
        """
        saved = {name: self._saved(f"{save}-{name}.npz") for name in names}
        some = {name: places[spread(len(places), _COMPARED)] for name, (places, _) in saved.items()}
        wanted = np.unique(np.concatenate([*some.values()])).tolist()
        setting, file = self.settings[exact], f"{save}-exact.npz"
        self.sides[exact].ask("vectors", of=of, budget=setting.budget, way=setting.way, places=wanted, save=file)
        computed = self._saved(file)
        return {name: agree_where_both(vectors, computed) for name, vectors in saved.items()}

    def _saved(self, file: str) -> tuple[NDArray[np.int64], Matrix]:
        with np.load(self._folder / file) as arrays:
            return arrays["places"], arrays["vectors"]
