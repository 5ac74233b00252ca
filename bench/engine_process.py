"""The sides of `make bench-engine` in processes of their own, so that thread pools and allocators stay apart.

They take turns: a line of JSON asks a side for one thing, a line answers, and until then all others wait for a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from engine_sides import Choice, Matrix, Side, make_side
from engine_texts import Set, spread

from embedstream.consumer.cpu import prepare
from embedstream.shared.settings import Settings


class SideFailed(Exception):
    """A side cannot be loaded, or died; the message says why."""


class Process:
    """A side, seen from outside.

    Args:
        choice: what it is made of.
        folder: of the sets, where it leaves its vectors too.
        given: arguments of `make_side` beside the choice: model, device, threads; and `prepare_all`, whether what a
            consumer asks of OpenMP and the allocator is asked for other sides too.
    """

    def __init__(self, choice: Choice, folder: Path, given: Mapping[str, Any]) -> None:
        self.choice = choice
        self.folder = folder
        argument = json.dumps({"choice": asdict(choice), "folder": str(folder), **given})
        self._log = (folder / f"{choice.name}.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, __file__, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.description: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return self.choice.name

    def ask(self, what: str, **arguments: Any) -> Any:
        """Let it do one thing; see `Work`.

        Raises:
            SideFailed: it could not.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise SideFailed(f"{self.name}: {self._last_words()}") from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideFailed(f"{self.name}: {self._last_words()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise SideFailed(f"{self.name}: {answer['failed']}")
        return answer["result"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"ended with {code}: {lines[-1] if lines else 'without a word'}"

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that would have to be written
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


class Work:
    """What a side does when it is asked; each method is a word of the protocol, its result what is answered.

    Args:
        side: loaded.
        folder: of the sets.
    """

    def __init__(self, side: Side, folder: Path) -> None:
        self._side = side
        self._folder = folder
        self._sets: dict[str, Set] = {}
        self._prepared: tuple[Any, list[Any]] = (None, [])

    def calibrate(self, of: str, budget: int, way: str, seconds: float) -> dict[str, float]:
        """Warm up with a batch of middle length, then time as many as seem to fit the time, at least one.

        Returns:
            tokens, texts and seconds of the timed part, and `batch_s` of one batch.
        """
        count = len(self._set(of).batches(budget))
        first = self.run(of, budget, way, [count // 2])
        again = self.run(of, budget, way, [count // 2])
        seen_s = min(first["seconds"], again["seconds"])
        more = min(count, int(seconds / max(seen_s, 1e-6)))
        if more < 2:
            return again | {"batch_s": seen_s}
        timed = self.run(of, budget, way, spread(count, more))
        return timed | {"batch_s": seen_s}

    def run(self, of: str, budget: int, way: str, batches: Sequence[int], save: str = "") -> dict[str, float]:
        """Compute some batches of a set, by their places among all, after they were prepared.

        Args:
            of: name of the set.
            budget: the batches are cut by.
            way: to work.
            batches: their places.
            save: file for the `places` of their texts in the set and the `vectors`; "" for none.
        """
        some = self._set(of)
        cuts = [some.batches(budget)[place] for place in batches]
        key = (of, budget, tuple(batches))
        if self._prepared[0] != key:
            self._prepared = (key, [self._side.prepare(*some.batch(*cut)) for cut in cuts])
        started_s = time.perf_counter()
        vectors = self._side.run(self._prepared[1], way)
        seconds = time.perf_counter() - started_s
        places = np.concatenate([np.arange(*cut) for cut in cuts])
        if save:
            self._save(save, places, np.concatenate(vectors))
        return {"tokens": int(some.lengths[places].sum()), "texts": len(places), "seconds": seconds}

    def vectors(self, of: str, budget: int, way: str, places: Sequence[int], save: str) -> None:
        """Compute the texts of some places, for comparison."""
        wanted = self._set(of).only(places)
        batches = [self._side.prepare(*wanted.batch(*cut)) for cut in wanted.batches(budget)]
        self._save(save, np.array(places), np.concatenate(self._side.run(batches, way)))

    def latency(self, of: str, way: str, seconds: float) -> list[float]:
        """Compute the texts of a set one by one for some time, at least each tenth of it once; seconds of each."""
        some = self._set(of)
        alone = [self._side.prepare(*some.batch(place, place + 1)) for place in range(len(some))]
        for batch in alone:
            self._side.run([batch], way)  # every shape once
        taken: list[float] = []
        end_s = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end_s:
            for batch in alone:
                started_s = time.perf_counter()
                self._side.run([batch], way)
                taken.append(time.perf_counter() - started_s)
        return taken

    def embed(self, of: str, budget: int, way: str, places: Sequence[int]) -> dict[str, float]:
        """From texts to vectors, tokenisation included."""
        some = self._set(of)
        texts = [some.texts[place] for place in places]
        lengths = some.lengths[np.array(places)]
        started_s = time.perf_counter()
        self._side.embed(texts, budget, way, float(lengths.mean()))
        seconds = time.perf_counter() - started_s
        return {"tokens": int(lengths.sum()), "texts": len(texts), "seconds": seconds}

    def _set(self, name: str) -> Set:
        if name not in self._sets:
            self._sets[name] = Set.load(self._folder / f"{name}.npz")
        return self._sets[name]

    def _save(self, name: str, places: Any, vectors: Matrix) -> None:
        np.savez(self._folder / name, places=places, vectors=vectors)


WORDS = ("calibrate", "run", "vectors", "latency", "embed")


def serve(work: Work, lines: IO[str], answer: Callable[[Any], None]) -> None:
    """Do what each line asks for, until there are no more; what fails is answered too."""
    for line in lines:
        asked = json.loads(line)
        what = asked.pop("do")
        try:
            if what not in WORDS:
                raise ValueError(f"{what} is not one of {', '.join(WORDS)}")
            answer({"result": getattr(work, what)(**asked)})
        except Exception as error:  # noqa: BLE001 (it is told to the one who asked)
            answer({"failed": f"{type(error).__name__}: {error}"})


def main() -> None:
    """The argument is what `Process` gives; the protocol has stdout to itself, libraries write to stderr."""
    given = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    choice, folder = Choice(**given["choice"]), Path(given["folder"])
    try:
        if choice.library == "ours" or given["prepare_all"]:
            prepare(Settings())  # as a consumer does, before torch is there
        from engine_model import read

        side = make_side(read(given["model"]), choice, given["device"], given["threads"], folder)
        answer({"result": {**side.describe(), "ways": side.ways}})
    except (Exception, SystemExit) as error:  # noqa: BLE001 (it is told to the one who asked)
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    serve(Work(side, folder), sys.stdin, answer)


if __name__ == "__main__":
    main()
