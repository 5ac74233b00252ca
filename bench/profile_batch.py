"""Where the time of one batch goes: `.venv/bin/python bench/profile_batch.py`, or `make profile-batch`.

Torch's profiler watches forward and pooling of a full batch of passages and of one query. The time of each operation
without those that it calls is counted to a part; what an encoder fuses, such as a linear layer with its activation,
counts as its first part. `--write` puts the tables into bench/results and docs/performance.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path

from engine_sides import Choice, Ours
from engine_texts import DATA, Set, read_texts, tokenised
from machine import cores, setting
from tables import put_between_marks, table

from embedstream.consumer.cpu import prepare
from embedstream.shared.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
MARKS = "table: make profile-batch", "end of profile-batch"
OTHER = "everything else"
PARTS: Mapping[str, tuple[str, ...]] = {
    "linear layers": (
        "addmm",
        "addmm_",
        "mm",
        "linear",
        "mkldnn_linear",
        "_linear_pointwise",
        "_mkl_linear",
        "_addmm_activation",
    ),
    "attention": (
        *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward"),
        *(
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_attention_math",
        ),
        *("bmm", "baddbmm", "_softmax", "softmax", "_safe_softmax", "varlen_attn", "_varlen_attn"),
    ),
    "gelu and other activations": ("gelu", "gelu_", "silu", "silu_", "relu", "relu_", "tanh", "tanh_"),
    "layer norms": ("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"),
    "sums of residuals and biases": ("add", "add_"),
    "embeddings and pooling": (
        "embedding",
        "index_select",
        "embedding_bag",
        "_embedding_bag",
        "_embedding_bag_forward_only",
    ),
    "copies": ("copy_", "cat", "clone", "contiguous", "_to_copy", "to", "index", "fill_", "slice", "split", "narrow"),
}


def part_of(operation: str) -> str:
    """The part that an operation counts to.

    Args:
        operation: as the profiler calls it, such as `aten::addmm`.
    """
    name = operation.rpartition("::")[2]
    return next((part for part, names in PARTS.items() if name in names), OTHER)


def shares(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Of all the time, by part; all parts are there, and they add up to 1.

    Args:
        times: operations, and the time of each without those that it calls.
    """
    summed = dict.fromkeys((*PARTS, OTHER), 0.0)
    for operation, taken in times:
        summed[part_of(operation)] += taken
    total = sum(summed.values())
    return {part: taken / total for part, taken in summed.items()}


def profiled(side: Ours, some: Set, cut: tuple[int, int], runs: int) -> tuple[dict[str, float], float]:
    """Shares of the parts, and milliseconds of one run while the profiler watches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    batch = [side.prepare(*some.batch(*cut))]
    for _ in range(2):
        side.run(batch, "")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as watched:
        for _ in range(runs):
            side.run(batch, "")
    times = [
        (event.key, float(event.self_cpu_time_total + event.self_device_time_total)) for event in watched.key_averages()
    ]
    return shares(times), sum(taken for _, taken in times) / runs / 1000


def measure(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The lines of the table; the folder is for what is measured when the model is loaded."""
    prepare(Settings())  # as a consumer does, before torch is there
    from engine_model import read

    known = read(options.model)
    passages = tokenised(known.tokenizer, read_texts(options.corpus, options.texts), known.recipe.max_length)
    queries = tokenised(known.tokenizer, read_texts(DATA / "queries.sample.jsonl.gz"), known.recipe.max_length)
    cuts = passages.batches(options.batch_tokens)
    middle, one = cuts[len(cuts) // 2], (len(queries) // 2, len(queries) // 2 + 1)
    columns: dict[str, tuple[dict[str, float], float]] = {}
    for encoder in options.encoders:
        side = Ours(known, Choice("ours", options.dtype, encoder), options.device, options.threads, folder)
        name = side.describe()["encoder"]
        columns[f"{name}, passages"] = profiled(side, passages, middle, options.runs)
        columns[f"{name}, one query"] = profiled(side, queries, one, 10 * options.runs)
    yield (
        f"{middle[1] - middle[0]} passages of {passages.lengths[middle[0] : middle[1]].sum():,} tokens, and a query of "
        f"{queries.lengths[one[0]]}, in {side.describe()['dtype']}.\n"
    )
    yield from table(
        ["part", *columns],
        [
            *([part, *(f"{of[part]:.1%}" for of, _ in columns.values())] for part in (*PARTS, OTHER)),
            ["milliseconds, watched", *(f"{milliseconds:,.1f}" for _, milliseconds in columns.values())],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--corpus", type=Path, default=DATA / "passages.sample.jsonl.gz", help="JSON lines with `text`")
    parser.add_argument("--texts", type=int, default=5000, help="unique passages that are read of the corpus")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--encoders", nargs="+", default=["", "padded"], help='by name; "" for the one that is chosen')
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write bench/results and docs/performance.md")
    options = parser.parse_args()
    where = f"{options.model}, {options.threads} threads. {setting(('torch', 'transformers'))}"
    print(where + "\n", flush=True)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in measure(options, Path(folder)):
            print(line, flush=True)
            lines.append(line)
    if options.write:
        command = shlex.join([".venv/bin/python", "bench/profile_batch.py", *sys.argv[1:]])
        text = "\n".join([f"`{command}`", "", where, "", *lines])
        results = ROOT / "bench" / "results" / f"{date.today():%Y-%m-%d}-profile-batch.md"
        results.write_text(f"# Where the time of a batch goes\n\n{text}\n", "utf-8")
        put_between_marks(PAGE, *MARKS, text)


if __name__ == "__main__":
    main()
