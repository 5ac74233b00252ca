"""OpenVINO as a side of `make bench-engine`: transformers' model, its pooling and normalisation in one graph.

The graph is converted once and kept below `build/`. Of its ways to work, one request on all cores (`latency`) and
several requests at a time (`throughput`), the search takes the better one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from engine_model import KnownModel, read
from engine_sides import Choice, Ids, Matrix, padded
from engine_texts import tokenised

from embedstream.shared.recipe import Pooling

GRAPHS = Path(__file__).resolve().parents[1] / "build" / "openvino"
_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVino:
    """A compiled graph for each way to work.

    Args:
        known: the model.
        choice: of number format; whether the CPU computes in it, `describe` says.
        threads: of all requests together.
    """

    ways = ("latency", "throughput")

    def __init__(self, known: KnownModel, choice: Choice, threads: int) -> None:
        graph = GRAPHS / f"{known.path.name}-{known.revision}-{openvino.__version__.partition('-')[0]}.xml"
        if not graph.exists():  # in a process of its own: what tracing leaves behind would stay here
            subprocess.run([sys.executable, __file__, str(known.path), str(graph)], check=True, stdout=sys.stderr)
        core = openvino.Core()
        options = {"INFERENCE_PRECISION_HINT": _HINTS[choice.dtype], "INFERENCE_NUM_THREADS": threads}
        self._known = known
        self._compiled = {
            way: core.compile_model(str(graph), "CPU", options | {"PERFORMANCE_HINT": way.upper()}) for way in self.ways
        }
        self._one = self._compiled["latency"].create_infer_request()
        self._several = openvino.AsyncInferQueue(self._compiled["throughput"])
        self._several.set_callback(_keep)

    def describe(self) -> dict[str, Any]:
        """The number format that it computes in, and how many requests it takes at a time."""
        precision = self._compiled["latency"].get_property("INFERENCE_PRECISION_HINT").to_string()
        dtype = next((name for name, hint in _HINTS.items() if hint == precision), precision)
        return {"dtype": dtype, "requests at a time": len(self._several)}

    def prepare(self, ids: Ids, lengths: Ids) -> Any:
        """See `Side`."""
        return padded(ids, lengths, self._known.pad_id)

    def run(self, batches: Sequence[Any], way: str) -> list[Matrix]:
        """See `Side`."""
        if way == "latency":
            return [np.array(self._one.infer(list(batch), share_inputs=True)[0]) for batch in batches]
        results: list[Any] = [None] * len(batches)
        for place, batch in enumerate(batches):
            self._several.start_async(list(batch), (results, place), share_inputs=True)
        self._several.wait_all()
        return results

    def embed(self, texts: Sequence[str], budget: int, way: str, mean_tokens: float) -> Matrix:
        """See `Side`."""
        some = tokenised(self._known.tokenizer, texts, self._known.recipe.max_length)
        batches = [self.prepare(*some.batch(*cut)) for cut in some.batches(budget)]
        return np.concatenate(self.run(batches, way))


def _keep(request: Any, place: tuple[list[Any], int]) -> None:
    results, number = place
    results[number] = np.array(request.get_output_tensor(0).data)


def convert(known: KnownModel, graph: Path) -> None:
    """Write the graph of a model whose vectors are a mean or a first token."""
    import torch
    from transformers import AutoModel

    recipe = known.recipe
    if recipe.pooling not in ((Pooling.MEAN,), (Pooling.CLS,)) or recipe.head:
        raise SystemExit(f"the OpenVINO side knows mean and cls, not {recipe.pooling_name} {recipe.head}".rstrip())

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(
                known.transformer, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            ).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if recipe.pooling == (Pooling.CLS,):
                vectors = hidden[:, 0]
            else:
                mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
                vectors = (hidden * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(vectors, dim=1) if recipe.normalize else vectors

    example = {
        "input_ids": torch.full((2, 7), known.pad_id, dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }
    with torch.inference_mode():
        model = openvino.convert_model(
            Whole(), example_input=example, input=[("input_ids", [-1, -1]), ("attention_mask", [-1, -1])]
        )
    graph.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, graph, compress_to_fp16=False)


if __name__ == "__main__":
    convert(read(sys.argv[1]), Path(sys.argv[2]))
