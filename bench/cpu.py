"""How a consumer should use its CPUs: `.venv/bin/python bench/cpu.py`, or `make bench-cpu`; about four minutes.

A consumer shares its cores with an event loop of its own, API processes and Valkey. So each way of running the same
model is tried beside a process that does what an API does (JSON, tokens, floats to text) at a fixed rate, and counts
how late it is. The ways take turns in rounds, each time in a new process that warms up first: of processes that sleep
while others take their turn, virtual machines may lend out the memory, and what comes back slowly would be timed.

The figures of a way: tokens/s of full batches; milliseconds of the forward pass of a query that comes after a pause;
CPU milliseconds that it cost, which show threads that spin behind it; the API's lateness while batches ran; CPU seconds
used in a second of these; page faults.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from engine_sides import force
from machine import setting
from tables import table

from embedstream.consumer import cpu
from embedstream.consumer.allocator import keep_memory
from embedstream.shared.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "bench" / "data"
BATCH_TOKENS = 4096
BATCHES = 8
QUERY_PAUSE_S = 0.01
"""Between two queries: longer than the threads of any way but the one that always spins wait for work."""
API_EVERY_S = 0.005
API_WORK_S = 0.001
"""Of CPU time for each request: a fifth of a core."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of using the CPUs.

    Args:
        name: in the table.
        threads: of a forward pass.
        keep_bytes: memory kept for the next batch; 0 leaves it to the C library.
        variables: of OpenMP.
        encoder: by name, "" for the one that the model chooses.
    """

    name: str
    threads: int
    keep_bytes: int
    variables: Mapping[str, str] = field(default_factory=dict)
    encoder: str = ""


def ways() -> Iterator[Way]:
    """What is compared: as torch comes, as a consumer runs, and that with one thing changed."""
    threads = cpu.thread_count(Settings())
    kept = Settings().keep_memory_bytes
    ours = cpu.wait_variables({})
    yield Way("as torch comes", threads, 0)
    yield Way("a consumer's", threads, kept, ours)
    yield Way("all threads in each layer", threads, kept, ours, "bert")
    yield Way("memory given back", threads, 0, ours)
    yield Way("passive", threads, kept, {"OMP_WAIT_POLICY": "passive"})
    for turns in (1_000, 100_000):
        yield Way(f"{turns:,} turns", threads, kept, {"GOMP_SPINCOUNT": str(turns)})
    yield Way("active", threads, kept, {"OMP_WAIT_POLICY": "active"})
    for fewer in sorted({threads - 1, threads // 2} - {0, threads}, reverse=True):
        yield Way(f"{fewer} thread{'s' * (fewer > 1)}", fewer, kept, ours)


@dataclass(slots=True)
class Found:
    """Of one way: a number for each round."""

    tokens_per_s: list[float] = field(default_factory=list)
    query_ms: list[float] = field(default_factory=list)
    query_cpu_ms: list[float] = field(default_factory=list)
    api_ms: list[float] = field(default_factory=list)
    api_late_ms: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)


class Process:
    """A child that answers each line with one of JSON."""

    def __init__(self, argument: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        foreign = ("OMP_", "GOMP_", "KMP_", "MALLOC_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(argument)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | variables,
        )

    def tell(self, what: str, seconds: float = 0.0) -> None:
        assert self._child.stdin is not None
        print(json.dumps([what, seconds]), file=self._child.stdin, flush=True)

    def answer(self) -> dict[str, float]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"a child ended with {self._child.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()


class Worker:
    """In a child: the model of a consumer, run one way."""

    def __init__(self, way: Way) -> None:
        keep_memory(way.keep_bytes, {})
        import numpy as np

        from embedstream.consumer.model import Model
        from embedstream.shared.settings import Dtype

        settings = Settings(threads=way.threads, device="cpu", dtype=Dtype.AUTO, log_level="error")
        self._model = Model.load(settings)
        if way.encoder:
            force(self._model, settings, way.encoder)
        random = np.random.default_rng(0)
        longest = self._model.recipe.max_length
        self._batches = []
        for _ in range(BATCHES):
            lengths = np.clip(random.lognormal(4.6, 0.7, 400).astype(np.int64), 3, longest)
            lengths = lengths[: int(np.searchsorted(lengths.cumsum(), BATCH_TOKENS))]
            self._batches.append((random.integers(1000, 20_000, int(lengths.sum())), np.sort(lengths)[::-1].copy()))
        self._query = random.integers(1000, 20_000, 11), np.array([11])
        for batch in self._batches[:2]:
            self._run(batch)

    def _run(self, batch: Any) -> None:
        self._model.forward(*batch).sum().item()

    def batches(self, seconds: float) -> dict[str, float]:
        """Full batches, at least one."""
        before, began_s, done = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), []
        while not done or time.perf_counter() - began_s < seconds:
            batch = self._batches[len(done) % BATCHES]
            self._run(batch)
            done.append(len(batch[0]))
        took_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
        used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {
            "tokens_per_s": sum(done) / took_s,
            "cpu": used_s / took_s,
            "faults": (after.ru_minflt - before.ru_minflt) / len(done),
        }

    def queries(self, seconds: float) -> dict[str, float]:
        """Single queries, each after a pause."""
        began_s, taken_ms, used_s = time.perf_counter(), [], time.process_time()
        while time.perf_counter() - began_s < seconds:
            time.sleep(QUERY_PAUSE_S)
            before_s = time.perf_counter()
            self._run(self._query)
            taken_ms.append((time.perf_counter() - before_s) * 1e3)
        used_ms = (time.process_time() - used_s) * 1e3
        return {"query_ms": median(taken_ms), "query_cpu_ms": used_ms / len(taken_ms)}


class Api:
    """In a child: requests at a fixed rate, whether or not the one before is done."""

    def __init__(self) -> None:
        import numpy as np
        import orjson

        vectors = np.random.default_rng(0).standard_normal((8, 384)).astype(np.float32)
        body = orjson.dumps({"input": ["some words of a query"] * 16, "model": "all-MiniLM-L6-v2"})

        def work() -> None:
            until_s = time.thread_time() + API_WORK_S
            while time.thread_time() < until_s:
                orjson.loads(body)
                orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)

        self._work = work
        self._stop = threading.Event()
        self._late_ms: list[float] = []

    def start(self, _seconds: float) -> dict[str, float]:
        self._stop.clear()
        self._late_ms = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return {}

    def stop(self, _seconds: float) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        taken = sorted(self._late_ms)
        return {"api_ms": median(taken), "api_late_ms": taken[int(len(taken) * 0.99)]}

    def _serve(self) -> None:
        due_s = time.perf_counter()
        while not self._stop.is_set():
            due_s += API_EVERY_S
            time.sleep(max(0.0, due_s - time.perf_counter()))
            self._work()
            self._late_ms.append((time.perf_counter() - due_s) * 1e3)


def serve_lines(worker: Worker | Api) -> None:
    """In a child: do what the lines ask."""
    print("{}", flush=True)
    for line in sys.stdin:
        what, seconds = json.loads(line)
        print(json.dumps(getattr(worker, what)(seconds)), flush=True)


def measure(compared: Sequence[Way], rounds: int, seconds: float) -> dict[str, Found]:
    """All ways in turn, in each round, each in a new process."""
    found = {way.name: Found() for way in compared}
    for number in range(rounds):
        for way in compared if number % 2 == 0 else reversed(compared):
            print(f"round {number + 1} of {rounds}: {way.name}", file=sys.stderr)
            with closing(Process({"api": True}, {})) as api, closing(Process(asdict(way), way.variables)) as worker:
                for process in (api, worker):
                    process.answer()
                _turn(worker, api, seconds / 4)  # it warms up
                for name, value in _turn(worker, api, seconds).items():
                    getattr(found[way.name], name).append(value)
    return found


def _turn(worker: Process, api: Process, seconds: float) -> dict[str, float]:
    taken: dict[str, float] = {}
    api.tell("start")
    api.answer()
    worker.tell("batches", seconds)
    taken |= worker.answer()
    api.tell("stop")
    taken |= api.answer()
    worker.tell("queries", seconds / 3)
    return taken | worker.answer()


HEAD = (
    *("way", "tokens/s", "to the first", "query, ms", "CPU a query, ms"),
    *("API, ms", "API p99, ms", "CPUs used", "faults a batch"),
)


def report(found: Mapping[str, Found]) -> Iterator[str]:
    first = next(iter(found.values()))
    rows = []
    for name, of in found.items():
        ratios = [one / other for one, other in zip(of.tokens_per_s, first.tokens_per_s, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        figures = [
            (of.query_ms, ".1f"),
            (of.query_cpu_ms, ".1f"),
            (of.api_ms, ".1f"),
            (of.api_late_ms, ".1f"),
            (of.cpu, ".2f"),
            (of.faults, ",.0f"),
        ]
        cells = [format(median(numbers), form) for numbers, form in figures]
        rows.append([name, f"{median(of.tokens_per_s):,.0f}", spread, *cells])
    return table(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of batches for each way and round")
    parser.add_argument("--write", action="store_true", help="put the table into bench/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        argument = json.loads(given.child)
        serve_lines(Api() if "api" in argument else Worker(Way(**argument)))
        return
    conditions = setting(["torch", "transformers"])
    lines = list(report(measure(list(ways()), given.rounds, given.seconds)))
    command = f"`bench/cpu.py --rounds {given.rounds} --seconds {given.seconds:g}`"
    text = "\n".join(["# Threads, waiting and memory of a consumer", "", f"{conditions} {command}", "", *lines, ""])
    print(text)
    if given.write:
        (ROOT / "bench" / "results" / f"{date.today():%Y-%m-%d}-cpu.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
