"""A backfill on a deployment: its processes started and killed, its output held against the input."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .corpus import Corpus
from .deployment import Deployment
from .processes import Process
from .trial import Broken

WITHIN_S = 100.0
"""Until a backfill that nobody kills any more is complete; what is promised of it is in the benchmarks."""
PART_ROWS = 500
PER_KILL_ROWS = 5 * PART_ROWS
"""A process that dies takes the parts with it that it has under way; more must not be computed again."""
_SHOWN = 10


@dataclass
class Backfill:
    """One job, whatever becomes of its processes.

    Args:
        here: where it runs.
        corpus: its input.
        out: a folder that does not exist, or a file by its name.
        part_rows: what is committed at a time.
        flags: more of the command line.
    """

    here: Deployment
    corpus: Corpus
    out: Path
    part_rows: int = PART_ROWS
    flags: Sequence[str] = ()
    started: list[Process] = field(default_factory=list)

    def start(self, ablate: str = "", **settings: object) -> Process:
        """Run the command, the same one each time.

        Args:
            ablate: name of an ablation of the process.
            **settings: of this process alone, by variable name without its prefix.
        """
        program = ["tests.chaos.ablated_backfill", ablate] if ablate else ["embedstream.deploy", "backfill"]
        where = [str(self.corpus.folder), str(self.out), "--text-column", "text", "--id-column", "id"]
        argv = [sys.executable, "-m", *program, *where, "--json", *self.flags]
        settings = {"REQUEST_TIMEOUT_S": None, "PART_ROWS": self.part_rows, **settings}
        process = self.here.start(f"backfill{len(self.started)}", argv, settings)
        self.started.append(process)
        return process

    @property
    def state(self) -> Path:
        """Its state folder."""
        return self.out.with_name(f"{self.out.name}.backfill")

    @property
    def committed(self) -> int:
        """Commit records there are."""
        return len(list((self.state / "parts").glob("*-*.json")))

    async def until_progress(self, process: Process, within_s: float = 60.0) -> None:
        """Wait for one more commit record, or for rows on a device that were not there before.

        Raises:
            Broken: the process has ended, or nothing happens.
        """
        committed, computed = self.committed, self.here.journal.size
        deadline_s = time.monotonic() + within_s
        while self.committed <= committed and self.here.journal.size <= computed:
            if process.code is not None:
                raise Broken(f"{process.name} ended with {process.code} before it had got any further")
            if time.monotonic() > deadline_s:
                raise Broken(f"no progress within {within_s:g} s")
            await asyncio.sleep(0.02)

    @staticmethod
    def parts_of(process: Process) -> int:
        """Parts that a process has committed, as it says."""
        told = [json.loads(line) for line in process.log_lines() if line.startswith(b"{")]
        return max((int(line["parts"]) for line in told if line["event"] == "part"), default=0)

    async def until_complete(self, *processes: Process, within_s: float = WITHIN_S) -> None:
        """Wait until the processes end by themselves, with the code that the corpus deserves.

        Raises:
            Broken: another code, or no end.
        """
        wanted = os.EX_DATAERR if self.corpus.bad else os.EX_OK
        deadline_s = time.monotonic() + within_s
        for process in processes:
            while process.code is None:
                if time.monotonic() > deadline_s:
                    raise Broken(f"{process.name} has not ended after {within_s:g} s")
                await asyncio.sleep(0.05)
            if process.code != wanted:
                raise Broken(f"{process.name} ended with {process.code}, not with {wanted}\n{process.log_tail()}")

    def check(self) -> None:
        """Hold the output against the input.

        Raises:
            Broken: as `check_files` says.
        """
        check_files(self.corpus, self.out)

    async def check_processes(self, within_s: float = 10.0) -> None:
        """Check that no process of the command outlives it, however it ended.

        Raises:
            Broken: one does.
        """
        deadline_s = time.monotonic() + within_s
        while left := [process.name for process in self.started if _group_lives(process)]:
            if time.monotonic() > deadline_s:
                raise Broken(f"children of {left} are still there")
            await asyncio.sleep(0.1)

    def kill_tokenizer(self, process: Process, chosen: random.Random) -> bool:
        """SIGKILL one of the processes that tokenise for a process, and say whether there was one."""
        found = [child for child in children(process.pid) if b"spawn_main" in command_line(child)]
        if found:
            os.kill(chosen.choice(found), signal.SIGKILL)
        return bool(found)

    def computed_again(self) -> int:
        """Rows on a device beyond one for each text."""
        runs = Counter(run.number for run in self.here.journal.runs() if run.lane == "bulk")
        return runs.total() - len(runs)


def check_files(corpus: Corpus, out: Path) -> None:
    """Hold the output and all that lies beside it against the input.

    Raises:
        Broken: a row is missing, there twice, out of order or wrong, or something is left over.
    """
    check_rows(corpus, *read(out))
    check_bad_rows(corpus, out.with_name(f"{out.name}.bad-rows.jsonl"))
    staged = out.with_name(f"{out.name}.backfill") / "staging" / "parts"
    left = [path for path in out.parent.rglob("*.tmp") if path.is_file()]
    left += staged.iterdir() if staged.exists() else ()
    left += [path for path in out.iterdir() if not path.name.startswith("part-")] if out.is_dir() else ()
    if left:
        raise Broken(f"{len(left)} files left over: {[str(path.relative_to(out.parent)) for path in left[:_SHOWN]]}")


def read(out: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(rows,) ids and (rows, dim) vectors of an output, in its order."""
    if out.suffix == ".gz":
        lines = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
        return np.array([line["id"] for line in lines]), np.array([line["embedding"] for line in lines], np.float32)
    paths = sorted(out.glob("*.parquet")) if out.is_dir() else [out]
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    column = table["embedding"].combine_chunks()
    vectors = np.asarray(column.flatten()).reshape(len(column), column.type.list_size)
    return np.asarray(table["id"]), vectors


def check_rows(corpus: Corpus, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
    """Hold ids and vectors of an output against the input.

    Raises:
        Broken: saying how many rows are missing, strange, there twice, out of order or wrong.
    """
    wanted, right = corpus.expected()
    counts = Counter(ids.tolist())
    missing = sorted(set(wanted.tolist()) - set(counts))
    strange = sorted(set(counts) - set(wanted.tolist()))
    twice = sorted(row for row, count in counts.items() if count > 1)
    for what, rows in (("missing", missing), ("there that should not be", strange), ("there twice", twice)):
        if rows:
            raise Broken(f"{len(rows)} of {len(wanted)} rows {what}: {rows[:_SHOWN]}")
    if not np.array_equal(ids, wanted):
        raise Broken(f"rows out of order: {ids[ids != wanted][:_SHOWN].tolist()}")
    wrong = np.flatnonzero((vectors != right).any(axis=1))
    if len(wrong):
        raise Broken(f"{len(wrong)} of {len(wanted)} rows wrong: {ids[wrong][:_SHOWN].tolist()}")


def check_bad_rows(corpus: Corpus, path: Path) -> None:
    """Hold the side file against the input.

    Raises:
        Broken: a bad row is missing, there twice, out of order, or has another reason.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    told = [(Path(line["file"]).name, int(line["row"]), str(line["reason"])) for line in lines]
    if told != corpus.bad:
        off = [*(set(corpus.bad) ^ set(told))][:_SHOWN]
        raise Broken(f"{len(told)} bad rows told of, not {len(corpus.bad)}: {off}")


def children(pid: int) -> list[int]:
    """Process ids of those that a process has started, with whichever of its threads."""
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def command_line(pid: int) -> bytes:
    """Program and arguments of a process; nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def _group_lives(process: Process) -> bool:
    if process.code is None:  # asked for, so that one that has ended does not count as a member
        return True
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
