"""How fast `embedstream backfill` is, and how much memory it takes: `.venv/bin/python bench/backfill.py null|passages`.

`null`: short rows and a model that costs nothing, so that all of the time is the pipeline's. Every row of the output is
checked against the input. `passages --file passages.jsonl`: real passages and a real model, beside the engine alone in
a process of its own, fed the same unique rows in the same order, tokenisation included; rounds of the two alternate.

Everything runs on this machine: an embedded Valkey, one consumer, and the command as users start it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from machine import setting
from null_consumer import DIMENSION, MARKS, card

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.producer import Lane, SyncProducer
from embedstream.shared.models import locate
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer, finished

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 16_384
WORDS = "the of and to in for is on that by this with you it not or be are from at as your all new was we".split()  # noqa: SIM905


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Args:
        seconds: from its start to its end.
        peak_bytes: most memory of its process.
        helper_bytes: the same of the largest of the processes that tokenise.
    """

    seconds: float
    peak_bytes: int
    helper_bytes: int


@contextmanager
def fleet(model: str, consumer: Sequence[str]) -> Iterator[str]:
    """An embedded Valkey and one warm consumer; gives the URL."""
    with EmbeddedServer(Settings()) as server:
        environment = os.environ | {"EMBEDSTREAM_REDIS_URL": server.url, "EMBEDSTREAM_LOG_LEVEL": "warning"}
        with subprocess.Popen([sys.executable, *consumer], env=environment) as process:
            try:
                wait_for(server.url, model)
                yield server.url
            finally:
                process.terminate()
                process.wait(60)


def wait_for(url: str, model: str) -> None:
    """Until the model answers."""
    deadline = time.monotonic() + 120
    with SyncProducer(url, model=model) as producer:
        while True:
            try:
                producer.embed(["warm", "up"] * 200, lane=Lane.BULK)
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return


def backfill(source: Path, target: Path, url: str, model: str) -> Run:
    """Run the command once."""
    command = [sys.executable, "-m", "embedstream.deploy", "backfill", str(source), str(target)]
    command += ["--id-column", "id", "--redis-url", url, "--model", model, "--served-model-name", model, "--truncate"]
    started_s = time.perf_counter()
    with subprocess.Popen(command) as process:
        watch = Memory(process.pid)
        code = process.wait()
        seconds = time.perf_counter() - started_s
        watch.stop()
    if code:
        raise SystemExit(f"the command ended with {code}")
    return Run(seconds, watch.peak_bytes, watch.helper_bytes)


class Memory:
    """Follows the memory of a process and its children in a thread."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self.peak_bytes = self.helper_bytes = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, high_water(self._pid))
            self.helper_bytes = max([self.helper_bytes, *map(high_water, children_of(self._pid))])


def children_of(pid: int) -> list[int]:
    """The processes that any thread of a process has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            found += map(int, task.read_text().split())
    return found


def high_water(pid: int) -> int:
    """Most memory a process ever had; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0)


def short_rows(path: Path, n_rows: int) -> pa.Table:
    """Rows of six words and a number; ids that are not the row numbers."""
    rng = np.random.default_rng(7)
    words = np.array(WORDS)[rng.integers(0, len(WORDS), (n_rows, 6))].tolist()
    texts = [f"{' '.join(some)} {number}" for number, some in enumerate(words)]
    table = pa.table({"id": rng.permutation(n_rows) * 3 + 1, "text": texts})
    pq.write_table(table, path, row_group_size=100_000)
    return table


def check_null(table: pa.Table, target: Path) -> None:
    """Every row is there once, in order, and its vector is that of its own text."""
    made = card()
    tokenizer = TextTokenizer(made.tokenizer, made.recipe)
    first = 0
    for batch in ds.dataset(target).to_batches(columns=["id", "embedding"]):
        some = table.slice(first, batch.num_rows)
        np.testing.assert_array_equal(batch.column("id"), some.column("id"))
        vectors = batch.column("embedding").flatten().to_numpy().reshape(-1, DIMENSION)
        tokens = tokenizer.encode(some.column("text").to_pylist())
        np.testing.assert_array_equal(vectors[:, 0], tokens.lengths)
        for place in range(MARKS):
            has = tokens.lengths > place
            np.testing.assert_array_equal(vectors[has, place + 1], tokens.ids[tokens.offsets[:-1][has] + place])
        first += batch.num_rows
    if first != table.num_rows:
        raise SystemExit(f"{first} rows of {table.num_rows}")


def null(options: argparse.Namespace) -> Iterator[str]:
    """The table of short rows."""
    yield f"{options.rows:,} rows of seven words, the null model, Parquet to Parquet:\n"
    yield "| round | seconds | rows/s | memory of the command, MB | of a process that tokenises, MB |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    rates, peaks = [], []
    with tempfile.TemporaryDirectory() as name, fleet("null", [str(ROOT / "bench" / "null_consumer.py")]) as url:
        source = Path(name) / "rows.parquet"
        table = short_rows(source, options.rows)
        for number in range(options.rounds):
            target = Path(name) / f"out{number}"
            run = backfill(source, target, url, "null")
            check_null(table, target)
            rates.append(options.rows / run.seconds)
            peaks.append(run.peak_bytes)
            yield (
                f"| {number + 1} | {run.seconds:.1f} | {rates[-1]:,.0f} | {run.peak_bytes / 1e6:,.0f} "
                f"| {run.helper_bytes / 1e6:,.0f} |"
            )
    yield f"\nMedian {statistics.median(rates):,.0f} rows/s, at most {max(peaks) / 1e6:,.0f} MB."
    yield "Ids, their order and the vectors were checked against the input."


def in_order_of_sending(texts: Sequence[str]) -> list[str]:
    """The texts as a backfill sends them: window by window, each text once, the shortest first."""
    files = locate("all-MiniLM-L6-v2").path
    recipe = card().recipe
    tokenizer = TextTokenizer(finished((files / "tokenizer.json").read_text(), do_lower_case=False), recipe)
    sent: list[str] = []
    seen: set[str] = set()
    for first in range(0, len(texts), WINDOW):
        some = [text for text in dict.fromkeys(texts[first : first + WINDOW]) if text not in seen]
        seen.update(some)
        lengths = tokenizer.encode(some, truncate_to=256).lengths
        sent += [some[place] for place in np.argsort(lengths, kind="stable").tolist()]
    return sent


def passages(options: argparse.Namespace) -> Iterator[str]:
    """The table of real passages."""
    with options.file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(options.rows), lines, strict=False)]
    texts = [row["text"] for row in rows]
    sent = in_order_of_sending(texts)
    yield f"{len(rows):,} passages, {len(sent):,} of them unique, all-MiniLM-L6-v2:\n"
    yield "| round | engine alone, rows/s | backfill, rows/s | ratio | memory of the command, MB |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(pa.table({"id": [row["id"] for row in rows], "text": texts}), folder / "in.parquet")
        pq.write_table(pa.table({"text": sent}), folder / "sent.parquet")
        command = [sys.executable, str(ROOT / "bench" / "engine_alone.py")]
        command += [str(folder / "sent.parquet"), str(folder / "engine.npy"), str(WINDOW)]
        consumer = ["-m", "embedstream.deploy", "consumer"]
        with (
            fleet("all-MiniLM-L6-v2", consumer) as url,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine,
        ):
            assert engine.stdin is not None
            assert engine.stdout is not None
            engine.stdout.readline()
            for number in range(options.rounds):
                engine.stdin.write("\n")
                engine.stdin.flush()
                alone = float(engine.stdout.readline())
                target = folder / f"out{number}"
                run = backfill(folder / "in.parquet", target, url, "all-MiniLM-L6-v2")
                ratios.append(alone / run.seconds)
                yield (
                    f"| {number + 1} | {len(rows) / alone:,.1f} | {len(rows) / run.seconds:,.1f} | {ratios[-1]:.3f} "
                    f"| {run.peak_bytes / 1e6:,.0f} |"
                )
            engine.stdin.close()
        table = ds.dataset(target).to_table()
        np.testing.assert_array_equal(table.column("id").to_pylist(), [row["id"] for row in rows])
        ours = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        place = {text: number for number, text in enumerate(sent)}
        theirs = np.load(folder / "engine.npy")[[place[text] for text in texts]]
    apart = np.abs(ours - theirs).max()
    yield f"\nMedian ratio {statistics.median(ratios):.3f}; components of the vectors differ by {apart:.1e} at most."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("null", "passages"))
    parser.add_argument("--rows", type=int, default=0, help="1,000,000 short rows, or 20,000 passages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path, help="passages: JSON lines with `id` and `text`")
    parser.add_argument("--write", action="store_true", help="write the table into bench/results")
    options = parser.parse_args()
    if options.what == "passages" and options.file is None:
        parser.error("passages needs --file")
    options.rows = options.rows or (1_000_000 if options.what == "null" else 20_000)
    lines = [setting(("torch", "pyarrow", "redis", "tokenizers")), ""]
    print(lines[0] + "\n")
    for line in (null if options.what == "null" else passages)(options):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        path = ROOT / "bench" / "results" / f"{date.today():%Y-%m-%d}-backfill-{options.what}.md"
        command = f"`.venv/bin/python bench/backfill.py {options.what} --rows {options.rows} --rounds {options.rounds}`"
        path.write_text(f"# Backfill: {options.what}\n\n{command}\n\n" + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
