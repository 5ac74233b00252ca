"""How fast the engine is beside other libraries: `make bench-engine`, or `.venv-bench/bin/python bench/engine.py`.

Forward pass and pooling of unique passages that were tokenised and sorted before, each side in a process of its own and
with the batches that suit it best; rounds in which the sides take turns. Then from text to vector, short queries in one
batch, single queries, and texts of one length. No cache, no quantisation, nothing computed once for two texts.

`--write` puts the tables into bench/results and docs/performance.md, and a picture beside them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import engine_report as report
from engine_model import read
from engine_rounds import Bench, Samples
from engine_sides import Choice
from engine_texts import DATA, LENGTH_CLASSES, Set, of_one_length, read_texts, spread, tokenised
from machine import cores, cpu_features, cpu_name, has_bfloat16, setting
from plot_engine import plot
from tables import put_between_marks

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
MARKS = "table: make bench-engine", "end of bench-engine"
PACKAGES = ("torch", "transformers", "sentence-transformers", "openvino")
OURS = Choice("ours", "auto")
EXACT = Choice("sentence-transformers", "float32")
PADDED = Choice("ours", "auto", "padded")
MIXED, ALONE = 512, 24
"""Queries of one batch, and those that run alone."""


@dataclass
class Found:
    """What was measured, for the picture."""

    labels: Mapping[str, str] = field(default_factory=dict)
    throughput: Samples = field(default_factory=dict)
    latency: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


def choices(encoders: Sequence[str], sides: Sequence[str]) -> list[Choice]:
    """The sides of a run: both formats of all libraries, ours as it chooses, and our encoders by name.

    Args:
        encoders: of ours, that are measured too.
        sides: libraries to leave out all others; none for all.
    """
    both = ("float32", "bfloat16")
    other = "float32" if has_bfloat16(cpu_features()) else "bfloat16"
    rivals = [Choice(library, dtype) for library in ("sentence-transformers", "openvino") for dtype in both]
    kept = [rival for rival in rivals if not sides or rival.library in sides or rival == EXACT]
    return [*kept, OURS, Choice("ours", other), *(Choice("ours", "auto", name) for name in encoders)]


def sets_of(options: argparse.Namespace) -> dict[str, Set]:
    """All sets, by name."""
    known = read(options.model)
    most = known.recipe.max_length
    passages = tokenised(known.tokenizer, read_texts(options.corpus, options.texts), most)
    queries = tokenised(known.tokenizer, read_texts(DATA / "queries.sample.jsonl.gz"), most)
    mixed = queries.only(spread(len(queries), MIXED))
    classes = {f"{length} tokens": of_one_length(passages, length) for length in LENGTH_CLASSES}
    return {
        "passages": passages,
        "mixed": mixed,
        "queries": mixed.only(spread(len(mixed), ALONE)),
        **{name: some for name, some in classes.items() if some is not None},
    }


def measure(bench: Bench, options: argparse.Namespace, found: Found) -> Iterator[str]:
    """The lines of all tables."""
    given = {name: getattr(options, name) for name in ("model", "device", "threads", "prepare_all")}
    bench.start(choices(options.encoders, options.sides), given)
    for name in (OURS.name, EXACT.name):
        if name not in bench.sides:
            raise SystemExit(f"{name} cannot be loaded: {bench.notes}")
    names, bfloat16 = [*bench.sides], options.device != "cpu" or has_bfloat16(cpu_features())
    found.labels = report.labels(bench.sides, bfloat16=bfloat16)
    natural = report.natural(bench.sides, bfloat16=bfloat16)
    bench.search(names, "passages")
    yield from report.notes_on_formats(bench.sides, bfloat16=bfloat16)
    whose = "all sides" if options.prepare_all else "ours alone"
    yield f"OpenMP's threads wait and malloc keeps memory as in a consumer: {whose}."
    yield from (f"\n{note}" for note in bench.notes)
    yield from _forward(bench, names, found)
    yield from _embedding(bench, natural)
    yield from _mixed(bench, given)
    yield from _alone(bench, names, found)
    yield from _by_length(bench, natural)


def _forward(bench: Bench, names: list[str], found: Found) -> Iterator[str]:
    some = bench.sets["passages"]
    yield "\n### Forward pass and pooling\n"
    found.throughput = bench.throughput(names, "passages", save="vectors")
    cosines = bench.cosines(names, EXACT.name, "passages", "vectors")
    yield (
        f"{len(some):,} unique passages, mean {some.lengths.mean():.0f} tokens, the longest first; each side computes "
        "batches evenly spread over all of them, with the size that its search found best. Medians (least–most) of "  # noqa: RUF001
        f"{bench.rounds} rounds; the exact vectors are those of {EXACT.name}.\n"
    )
    yield from report.throughput(found.throughput, bench.settings, cosines, OURS.name)


def _embedding(bench: Bench, names: list[str]) -> Iterator[str]:
    yield "\n### From text to vector\n"
    yield "The same passages in random order, tokenisation included.\n"
    yield from report.rates(bench.embedding(names, "passages", 0.5), OURS.name, "texts/s")


def _mixed(bench: Bench, given: Mapping[str, object]) -> Iterator[str]:
    some = bench.sets["mixed"]
    bench.start([] if PADDED.name in bench.sides else [PADDED], given)
    names = [name for name in (OURS.name, PADDED.name, EXACT.name) if name in bench.sides]
    yield "\n### Short queries of mixed lengths in one batch\n"
    yield f"{len(some)} queries, mean {some.lengths.mean():.1f} tokens, the longest {some.lengths.max()}.\n"
    yield from report.rates(bench.one_batch(names, "mixed"), OURS.name, "texts/s")


def _alone(bench: Bench, names: list[str], found: Found) -> Iterator[str]:
    some = bench.sets["queries"]
    found.latency = bench.latency(names, "queries", 0.15)
    yield "\n### One query alone\n"
    yield f"Forward and pooling of {len(some)} queries, one at a time, mean {some.lengths.mean():.1f} tokens.\n"
    yield from report.latency(found.latency, OURS.name)


def _by_length(bench: Bench, names: list[str]) -> Iterator[str]:
    lengths = [length for length in LENGTH_CLASSES if f"{length} tokens" in bench.sets]
    samples = {length: bench.throughput(names, f"{length} tokens", 0.2) for length in lengths}
    yield "\n### Texts of one length\n"
    yield f"Tokens/s without any padding; in brackets {OURS.name} ÷ the side.\n"
    yield from report.by_length(samples, OURS.name)


def write(lines: Sequence[str], where: str, found: Found, command: str, model: str) -> None:
    """Put tables and picture into bench/results, and both into the page."""
    results = RESULTS / f"{date.today():%Y-%m-%d}-engine.md"
    picture = results.with_suffix(".png")
    throughput = {found.labels[name]: values for name, values in found.throughput.items()}
    latency = {found.labels[name]: values for name, values in found.latency.items()}
    plot(picture, throughput, latency, f"{model}, {cores()} cores of {cpu_name()}, {date.today():%Y-%m-%d}")
    text = "\n".join([f"`{command}`", "", where, "", *lines])
    alt = "Bars: tokens per second of each side, and milliseconds of a single query"
    results.write_text(f"# The engine beside other libraries\n\n{text}\n\n![{alt}]({picture.name})\n", "utf-8")
    on_page = f"{text}\n\n![{alt}](../bench/results/{picture.name})"
    put_between_marks(PAGE, *MARKS, on_page)
    print(f"\nwritten to {results}, {picture} and {PAGE}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--corpus", type=Path, default=DATA / "passages.sample.jsonl.gz", help="JSON lines with `text`")
    parser.add_argument("--texts", type=int, default=5000, help="unique passages that are read of the corpus")
    parser.add_argument("--device", default="cpu", help="of torch's sides, such as `cuda`; OpenVINO stays on the CPU")
    parser.add_argument("--threads", type=int, default=cores(), help="of each side; all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds-per-round", type=float, default=4.0, help="that each side computes in a round")
    parser.add_argument("--encoders", nargs="*", default=[], help="ours by name, measured beside the one it chooses")
    parser.add_argument("--sides", nargs="*", default=[], help="libraries to compare with; all")
    parser.add_argument(
        "--prepare-all", action="store_true", help="let OpenMP and malloc of all sides do what a consumer lets them do"
    )
    parser.add_argument("--write", action="store_true", help="write bench/results and docs/performance.md")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    where = f"{options.model}, {options.threads} threads. {setting(PACKAGES)}"
    print(where + "\n", flush=True)
    lines, found = [], Found()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sets_of(options), options.seconds_per_round, options.rounds)
        try:
            for line in measure(bench, options, found):
                print(line, flush=True)
                lines.append(line)
        finally:
            bench.close()
        bench.tell("done")
    if options.write:
        write(
            lines, where, found, shlex.join([".venv-bench/bin/python", "bench/engine.py", *sys.argv[1:]]), options.model
        )


if __name__ == "__main__":
    main()
