"""How far vectors in bfloat16 and float16 are from those in float32: `.venv/bin/python bench/precision.py`.

Passages and queries of bench/data are embedded by all-MiniLM-L6-v2 by the way that jobs go, each alone and in full
batches. `--write` puts the tables into bench/results and docs/models.md; `make precision` does it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tables import put_between_marks, table

from embedstream.consumer.agreement import agreement
from embedstream.consumer.device import batch_budget
from embedstream.consumer.direct import Direct
from embedstream.consumer.formats import bfloat16_feature
from embedstream.consumer.model import Model
from embedstream.consumer.probe_texts import SHORT
from embedstream.shared.recipe import Pooling
from embedstream.shared.settings import Dtype, Settings

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "bench" / "data"
PAGE = ROOT / "docs" / "models.md"
HALVES = (Dtype.BFLOAT16, Dtype.FLOAT16)
WAYS = tuple(pooling for pooling in Pooling if pooling is not Pooling.ALL)
TOP = 10

Matrix = NDArray[np.float32]


def texts_of(name: str, most: int) -> list[str]:
    """The first texts of a sample."""
    with gzip.open(DATA / f"{name}.sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(most), lines, strict=False)]


def load(model: str, device: str | None, dtype: Dtype) -> tuple[Model, int]:
    """A model in a number format, and the tokens of a full batch."""
    settings = Settings(model=model, device=device, dtype=dtype)
    loaded = Model.load(settings)
    return loaded, batch_budget(settings, loaded.device)


def matrix(direct: Direct, texts: Sequence[str], *, alone: bool = False) -> Matrix:
    answer = direct.embed(texts, alone=alone)
    if answer.reasons:
        raise SystemExit(f"{len(answer.reasons)} texts have no vector: {next(iter(answer.reasons.values()))}")
    return np.stack([vector for vector in answer.vectors if vector is not None])


def apart(ours: Matrix, exact: Matrix) -> list[str]:
    """Cells: least cosine, mean cosine, largest error."""
    found = agreement(list(ours), list(exact))
    return [f"{found.cosine:.6f}", f"{found.mean_cosine:.6f}", f"{found.error:.1e}"]


def neighbours(queries: Matrix, passages: Matrix) -> NDArray[np.int64]:
    """(queries, TOP) places of the nearest passages."""
    return np.argsort(-(queries @ passages.T), axis=1, kind="stable")[:, :TOP]


def kept(found: NDArray[np.int64], exact: NDArray[np.int64]) -> list[str]:
    """Cells: share of queries with the same nearest passage, and of the same nearest ten in any order."""
    same = np.mean(found[:, 0] == exact[:, 0])
    shared = np.mean([len({*one} & {*other}) for one, other in zip(found.tolist(), exact.tolist(), strict=True)]) / TOP
    return [f"{same:.1%}", f"{shared:.1%}"]


def embedded(dtype: Dtype, options: argparse.Namespace) -> dict[str, Matrix]:
    """All that is embedded in one number format, by the names of `measure`."""
    model, budget = load(options.model, options.device, dtype)
    passages, few = texts_of("passages", options.passages), texts_of("passages", options.few)
    direct, card = Direct(model, budget), model.card
    made = {
        "passages": matrix(direct, passages),
        "alone": matrix(direct, few, alone=True),
        "queries": matrix(direct, texts_of("queries", options.queries)),
        "odd texts": matrix(direct, list(SHORT.values())),
    }
    for pooling in WAYS:
        model.card = replace(card, recipe=replace(card.recipe, pooling=(pooling,)))
        made[pooling] = matrix(Direct(model, budget), few)
    return made


def measure(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the tables."""
    made = {dtype: embedded(dtype, options) for dtype in (Dtype.FLOAT32, *HALVES)}
    exact = made[Dtype.FLOAT32]
    yield from table(
        ["format", "texts", "least cosine", "mean cosine", "largest error"],
        (
            [dtype, f"{len(exact[name])} {name}", *apart(made[dtype][name], exact[name])]
            for dtype in HALVES
            for name in ("passages", "queries", "odd texts")
        ),
    )
    yield f"\n{options.few} passages alone, and in batches with others of like length:\n"
    yield from table(
        ["format", "least cosine", "mean cosine", "largest error"],
        ([dtype, *apart(of_dtype["passages"][: options.few], of_dtype["alone"])] for dtype, of_dtype in made.items()),
    )
    n_queries, n_passages = len(exact["queries"]), len(exact["passages"])
    yield f"\nThe neighbours of {n_queries} queries among {n_passages} passages, beside those that float32 finds:\n"
    nearest = neighbours(exact["queries"], exact["passages"])
    yield from table(
        ["queries in", "passages in", "same nearest", f"same nearest {TOP}"],
        (
            [one, other, *kept(neighbours(made[one]["queries"], made[other]["passages"]), nearest)]
            for one, other in [(dtype, dtype) for dtype in HALVES] + [(dtype, Dtype.FLOAT32) for dtype in HALVES]
        ),
    )
    yield f"\n{options.few} passages, the hidden states pooled in other ways:\n"
    yield from table(
        ["pooling", *(f"least cosine in {dtype}" for dtype in HALVES)],
        ([f"`{way}`", *(apart(made[dtype][way], exact[way])[0] for dtype in HALVES)] for way in WAYS),
    )


def setting(model: str) -> str:
    """Where it was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    capability = ", ".join(
        [torch.backends.cpu.get_cpu_capability(), bfloat16_feature() or "no instructions for bfloat16"]
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{date.today():%Y-%m-%d}, {model} on {device} ({capability}), {versions}."


def write(lines: Sequence[str], where: str) -> None:
    """Put the tables into a file of results, and into the page between its marks."""
    text = "\n".join([where, "", *lines])
    results = ROOT / "bench" / "results" / f"{date.today():%Y-%m-%d}-precision.md"
    results.write_text(f"# Vectors in bfloat16 and float16 beside float32\n\n`make precision`\n\n{text}\n", "utf-8")
    put_between_marks(PAGE, "table: make precision", "end of precision", text)
    print(f"\nwritten to {results} and {PAGE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--device", help="such as `cuda`; the CPU where there is no other")
    parser.add_argument("--passages", type=int, default=192)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument(
        "--few", type=int, default=32, help="passages that are embedded again, alone and otherwise pooled"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into bench/results and docs/models.md")
    options = parser.parse_args()
    where = setting(options.model)
    lines: list[Any] = []
    print(where + "\n")
    for line in measure(options):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        write(lines, where)


if __name__ == "__main__":
    main()
