"""A small backfill killed before each thing it does to files: `python -m tests.chaos.crash_points`.

Everything but the queue is real. The backfill runs in a fork of this process, and dies there before its k-th act: a
file opened for writing, made durable, renamed or removed, a part begun, written to or committed, the output finished.
Then it runs once more to its end, and the output is held against the input. What is done is counted by the hooks that
Python has for auditing: the production code knows nothing of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from embedstream.producer.backfill import backfill as backfills
from embedstream.producer.backfill import tokenizing
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.progress import Progress
from embedstream.producer.backfill.records import Records
from embedstream.producer.backfill.sink import PartWriter, Sink
from embedstream.producer.backfill.sinks import open_sink
from embedstream.producer.fleet import ServedModel
from embedstream.producer.request import Embeddings, Options, Prepared
from embedstream.shared import exits
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import EmbedstreamError
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.tokenization import TextTokenizer

from . import corpus, toy
from .ablations import replace_in
from .backfill_ablations import ABLATIONS
from .corpus import Corpus
from .crash_targets import Target, target_of
from .trial import Broken

ROWS = 48
PART_ROWS = 24
MOST_S = 60
"""Of a run: one that hangs is ended by the kernel."""
_RENAMING = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1, "os.truncate": 0}
"""Audit events, and which of their arguments is the path that changes."""
_WRITING = os.O_WRONLY | os.O_RDWR


class Acts:
    """Counts acts of this process, and kills it before one of them.

    Args:
        folder: only files below it count.
        before_end: how many are done; -1 for all.
    """

    def __init__(self, folder: Path, before_end: int) -> None:
        self._folder = str(folder)
        self._before_end = before_end
        self.done = 0
        self._lock = threading.Lock()

    def install(self) -> None:
        """From now on, and until this process ends."""
        sys.addaudithook(self._on_event)
        fsync = os.fsync

        def counted(file: int) -> None:
            self.next()
            fsync(file)

        replace_in(os, "fsync", counted)  # there is no event for it

    def next(self) -> None:
        """One more is about to be done."""
        with self._lock:
            if self.done == self._before_end:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done += 1

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2]
            counts = isinstance(flags, int) and bool(flags & _WRITING)
        else:
            place = _RENAMING.get(event)
            counts = place is not None
            path = arguments[place] if place is not None else None
        if counts and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder):
            self.next()


@dataclass
class CountedPart:
    """A part whose calls are acts."""

    part: PartWriter
    acts: Acts

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows, or some of them and die."""
        self.acts.next()
        self.part.write(carried, vectors)

    def commit(self) -> None:
        """Commit."""
        self.acts.next()
        self.part.commit()

    def abort(self) -> None:
        """Abort."""
        self.part.abort()


@dataclass
class CountedSink:
    """A sink whose calls are acts."""

    sink: Sink
    acts: Acts

    def begin(self, part: PartId) -> CountedPart:
        """Begin a part."""
        self.acts.next()
        return CountedPart(self.sink.begin(part), self.acts)

    def finish(self, parts: Sequence[PartId]) -> None:
        """Finish."""
        self.acts.next()
        self.sink.finish(parts)
        self.acts.next()

    def close(self) -> None:
        """Close."""
        self.sink.close()


class ToyProducer:
    """Answers at once, as the toy consumer would.

    Args:
        computed: where the number of texts that were computed is appended, a line a request.
    """

    max_undelivered_bytes = 64 * 1024 * 1024

    def __init__(self, computed: Path) -> None:
        card = toy.card()
        self._served = ServedModel(
            Keys("ek", toy.MODEL), (toy.MODEL,), card, TextTokenizer(card.tokenizer, card.recipe)
        )
        self._computed = computed
        self.redis = Redis(unix_socket_path="/nowhere", retry=Retry(NoBackoff(), 0))
        self.fleet = SimpleNamespace(live=self._live, consumers=(SimpleNamespace(dtype="float32"),), trouble=None)

    async def run(self, prepared: Prepared) -> Embeddings:
        """Vectors of a request."""
        with self._computed.open("a") as file:
            file.write(f"{prepared.n_inputs}\n")
        tokens = prepared.tokens
        return Embeddings(toy.vectors(tokens.ids, tokens.lengths), tokens.lengths, 0, SimpleNamespace())  # type: ignore[arg-type] # nobody looks at the timing

    async def _live(self) -> ServedModel:
        return self._served


class InlineTokenizing:
    """Tokenises on a thread: a process would take longer to start than all the rest."""

    def __init__(self, card: ModelCard, options: Options, processes: int) -> None:
        del processes
        tokenizing._begin(card, options)

    async def encode(self, texts: pa.LargeStringArray) -> tokenizing.TokenizedTexts:
        """Tokenise."""
        return await asyncio.to_thread(tokenizing._encode, texts)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Trial:
    """One backfill, killed and resumed.

    Args:
        made: its input.
        folder: empty; for its output and state.
        target: of its vectors.
    """

    made: Corpus
    folder: Path
    target: Target

    def run(self, n_acts: int = -1) -> int:
        """Run it in a fork of this process until so many acts are done, -1 for all; returns the exit code."""
        pid = os.fork()
        if pid == 0:
            code = os.EX_SOFTWARE
            signal.alarm(MOST_S)
            try:
                code = self._in_child(n_acts)
            except EmbedstreamError as error:
                exits.complain(str(error))
                code = exits.code_of(error)
            except BaseException:  # noqa: BLE001 - nothing of it may run on as a second parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run_whole(self) -> int:
        """Run it undisturbed; returns how many acts that took."""
        self.check(self.run(), 0)
        return int(self.acts.read_text())

    def check(self, code: int, committed: int) -> None:
        """Hold the output against the input, after the last run.

        Args:
            code: it ended with.
            committed: rows that were committed before it.

        Raises:
            Broken: what is wrong.
        """
        if code != os.EX_DATAERR:
            raise Broken(f"it ended with {code} when it ran again")
        self.target.check(self.made)
        computed = self.computed
        total = sum(map(int, computed.read_text().split())) if computed.exists() else 0
        if total > len(self.made.good) - committed:
            raise Broken(
                f"{total} texts computed again, and no more than {len(self.made.good)} - {committed} had to be"
            )

    @property
    def computed(self) -> Path:
        """Where the number of computed texts stands."""
        return self.folder / "computed"

    @property
    def acts(self) -> Path:
        """Where a run that was not killed writes how much it did."""
        return self.folder / "acts"

    def committed(self) -> int:
        """Rows of the output that are committed; it is no backfill that asks."""
        parts = self.target.state / "parts"
        return sum(record.rows for record in Records(parts).all()) if parts.exists() else 0

    def _in_child(self, n_acts: int) -> int:
        acts = Acts(self.folder, n_acts)
        replace_in(backfills, "open_sink", lambda *asked: CountedSink(open_sink(*asked), acts))
        replace_in(backfills, "Tokenizing", InlineTokenizing)
        options = BackfillOptions(
            InputOptions(str(self.made.folder), id_column="id"),
            OutputOptions(self.target.url),
            Options(lane=Lane.BULK, partial=True),
            part_rows=PART_ROWS,
            state=self.target.state,
        )
        producer: Any = ToyProducer(self.computed)
        acts.install()
        outcome = asyncio.run(backfills.backfill(producer, options, Progress(), asyncio.Event()))
        self.acts.write_text(str(acts.done))
        return os.EX_DATAERR if outcome.bad_rows else os.EX_OK


async def in_a_process(folder: Path, seed: int, out: str, ablate: str = "", most: int = 10_000) -> tuple[int, str]:
    """Run this module; returns its exit code and its last line.

    Args:
        folder: for all of it.
        seed: of the input and of the order.
        out: what `target_of` takes.
        ablate: a guard that is taken out.
        most: acts, by chance.
    """
    argv = ["-m", "tests.chaos.crash_points", str(folder), "--out", out, "--seed", str(seed)]
    argv += ["--ablate", ablate, "--most", str(most)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = output.decode().splitlines()
    assert process.returncode is not None
    return process.returncode, lines[-1] if process.returncode != 1 else "\n".join(lines[-30:])


def main() -> int:
    """Kill at every act; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--most", type=int, default=10_000, help="acts, by chance, where all take too long")
    parser.add_argument("--ablate", default="")
    options = parser.parse_args()
    if options.ablate:
        ABLATIONS[options.ablate]()
    made = corpus.make(options.folder / "in", options.seed, ROWS, corpus.Kind(".jsonl*", bad=0.2))
    folder = options.folder / "trial"
    chosen = random.Random(options.seed)
    with target_of(folder, options.out) as target:
        trial = Trial(made, folder, target)
        n_acts = _begin(trial).run_whole()
        n_kills = min(n_acts, options.most)
        for number in chosen.sample(range(n_acts), n_kills):  # so that a broken one is met soon
            _one(_begin(trial), number, chosen.randrange(n_acts) if number % 3 == 0 else 0)
    sys.stdout.write(f"{n_kills} kills\n")
    return os.EX_OK


def _begin(trial: Trial) -> Trial:
    """As if it had never been run."""
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.folder.mkdir()
    trial.target.clear()
    return trial


def _one(trial: Trial, number: int, again: int) -> None:
    """Kill before an act, and if `again` is not 0, before that one of the second run as well."""
    try:
        for n_acts in [number, *([again] if again else [])]:
            code = trial.run(n_acts)
            if code not in (-signal.SIGKILL, os.EX_DATAERR):  # threads take turns: a run may have fewer acts
                raise Broken(f"it ended with {code}")
        committed = trial.committed()
        trial.computed.unlink(missing_ok=True)
        trial.check(trial.run(), committed)
    except Broken as error:
        raise Broken(f"killed before act {number} of a backfill to {trial.target.url}: {error}") from None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(os.EX_SOFTWARE)
