"""Whether models keep their published quality: `make quality STSB=stsb-en-test.csv`.

Embeds the pairs of the STSBenchmark's test set through a real consumer, and compares the rank correlation of their
cosines with that of people's scores (Spearman, times 100) with the figure of the MTEB leaderboard. The file holds one
pair a line, as `first,second,score`; PhilipMay/stsb-multi-mt has it as data/stsb-en-test.csv. Its texts have licences
of their own, so it is not a part of this repository.

The three number formats of all-MiniLM-L6-v2 are measured: `auto` is one of the others, depending on the processor.
Ends with 1 when a figure is further than 0.05 from the published one. `--mpnet` takes a folder with all-mpnet-base-v2,
as `embedstream fetch` makes it: `make quality-mpnet` does both. `--write` puts the table into bench/results.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import cpu_name
from numpy.typing import NDArray

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.producer import SyncProducer
from embedstream.shared.cards import Announcement
from embedstream.shared.connections import connect_sync
from embedstream.shared.keys import Keys
from embedstream.shared.settings import Dtype, Settings

RESULTS = Path(__file__).with_name("results")
TOLERANCE = 0.05
DTYPES = (Dtype.FLOAT32, Dtype.AUTO, Dtype.BFLOAT16)
_SLICE = 512
_PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Target:
    """A model in one number format, and the figure that is published for it."""

    name: str
    model: str
    dtype: Dtype
    published: float


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a target."""

    target: Target
    device: str
    dtype: str
    spearman: float

    @property
    def ok(self) -> bool:
        return abs(self.spearman - self.target.published) <= TOLERANCE


def read_pairs(path: Path) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """First texts, second texts, and how alike people found them."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [row[0] for row in rows], [row[1] for row in rows], np.array([float(row[2]) for row in rows])


def ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], np.float64)


def spearman(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


@contextmanager
def consumer(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A consumer process of the model, until the end of the context."""
    given = {"REDIS_URL": settings.redis_url, "KEY_PREFIX": settings.key_prefix, "LOG_LEVEL": "warning"}
    given |= {"MODEL": settings.model, "DTYPE": settings.dtype}
    environment = os.environ | {f"EMBEDSTREAM_{name}": str(value) for name, value in given.items()}
    process = subprocess.Popen([sys.executable, "-m", "embedstream.consumer"], env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def embed(producer: SyncProducer, texts: Sequence[str]) -> NDArray[np.float32]:
    """(texts, dimension) in float32."""
    slices = [texts[start : start + _SLICE] for start in range(0, len(texts), _SLICE)]
    return np.concatenate([producer.embed(some, truncate_prompt_tokens=-1) for some in slices])


def announcement(url: str, keys: Keys, process: subprocess.Popen[bytes]) -> Announcement:
    """What the consumer says of itself, when it has loaded the model."""
    with closing(connect_sync(url)) as redis:
        while True:
            names: Any = redis.zrange(keys.live, 0, -1)
            beat: Any = redis.get(keys.heartbeat(names[0].decode())) if names else None
            if beat is not None:
                return Announcement.decode(beat)
            if process.poll() is not None:
                raise SystemExit(f"the consumer ended with {process.returncode}, see its message above")
            time.sleep(0.1)


def measure(url: str, number: int, target: Target, stsb: Path) -> Row:
    """Embed all pairs with one model, and correlate."""
    first, second, scores = read_pairs(stsb)
    given: dict[str, Any] = {"redis_url": url, "key_prefix": f"quality{number}", "model": target.model}
    settings = Settings(dtype=target.dtype, request_timeout_s=3600, max_wait_s=3600, **given)
    with consumer(settings) as process:
        said = announcement(url, Keys(settings.key_prefix, settings.served_names[0]), process)
        with SyncProducer(url, settings=settings) as producer:
            one, other = embed(producer, first), embed(producer, second)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = np.einsum("ij,ij->i", one, other, dtype=np.float64) / lengths
    return Row(target, said.device, said.dtype, 100 * spearman(cosines, scores))


def table(rows: Sequence[Row], pairs: int) -> str:
    """In Markdown, with what it was measured on."""
    today = datetime.now(UTC).date()
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    lines = [
        "# STSBenchmark, test set: Spearman's rank correlation of cosines, times 100",
        "",
        f"{today}, `bench/quality.py`, {pairs} pairs through a consumer on {cpu_name()}. Python",
        f"{platform.python_version()}, {versions}. Published are the figures of the",
        f"MTEB leaderboard; more than {TOLERANCE} apart fails. What `auto` computes in depends on the processor.",
        "",
        "| model | `--dtype` | computed in | here | published | difference |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.target.name} | {row.target.dtype} | {row.dtype} on {row.device} | {row.spearman:.2f} "
        f"| {row.target.published:.2f} | {row.spearman - row.target.published:+.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stsb", type=Path, help="the test set as CSV")
    parser.add_argument("--mpnet", type=Path, help="folder with all-mpnet-base-v2, to be measured as well")
    parser.add_argument("--write", action="store_true", help="put the table into bench/results")
    options = parser.parse_args()
    targets = [Target("all-MiniLM-L6-v2", "all-MiniLM-L6-v2", dtype, 82.03) for dtype in DTYPES]
    if options.mpnet is not None:
        targets.append(Target("all-mpnet-base-v2", str(options.mpnet), Dtype.FLOAT32, 83.42))
    rows = []
    with EmbeddedServer(Settings()) as server:
        for number, target in enumerate(targets):
            rows.append(measure(server.url, number, target, options.stsb))
            print(f"{target.name} in {target.dtype}: {rows[-1].spearman:.3f}", file=sys.stderr, flush=True)
    shown = table(rows, len(read_pairs(options.stsb)[2]))
    print(shown, end="")
    if options.write:
        (RESULTS / f"{datetime.now(UTC).date()}-quality.md").write_text(shown, encoding="utf-8")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
