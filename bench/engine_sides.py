"""The sides of `make bench-engine`. Heavy libraries are imported by the side that needs them.

Every side pools and normalises as the model's files say, and gives float32 vectors that lie on the host. What its
tokenizer would have made of a batch is prepared outside of the clock; padding counts as that, for the sides that pad.
Ours takes its ids as they lie: all that it makes of them is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engine_model import KnownModel

Matrix = NDArray[np.float32]
Ids = NDArray[np.integer[Any]]

_COMPILED = "compiled"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a side is made of.

    Args:
        library: `sentence-transformers`, `openvino` or `ours`.
        dtype: `float32`, `bfloat16`, … or, for ours, `auto`.
        encoder: of ours, by name, or `compiled` for what `--compile` gives; "" for the one that it chooses.
    """

    library: str
    dtype: str
    encoder: str = ""

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return " ".join(part for part in (self.library, self.dtype, self.encoder) if part)


class Side(Protocol):
    """A way from ids to vectors."""

    @property
    def ways(self) -> tuple[str, ...]:
        """Ways to work, the one for a single query first; of most libraries there is one, without a name."""

    def describe(self) -> dict[str, Any]:
        """The `dtype` that it computes in, and what else people should know."""

    def prepare(self, ids: Ids, lengths: Ids) -> Any:
        """A batch as `run` takes it, from (total,) ids and (n,) lengths."""

    def run(self, batches: Sequence[Any], way: str) -> list[Matrix]:
        """(n, dim) vectors of each batch, pooled and normalised."""

    def embed(self, texts: Sequence[str], budget: int, way: str, mean_tokens: float) -> Matrix:
        """(n, dim) vectors of texts, tokenised now, in batches of at most `budget` tokens.

        Args:
            texts: in any order.
            budget: tokens of a batch.
            way: to work.
            mean_tokens: of these texts, for those that count their batches in rows.
        """


def padded(ids: Ids, lengths: Ids, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n, longest) ids filled up on the right, and the mask of what is no padding."""
    present = np.arange(int(lengths.max())) < np.asarray(lengths)[:, None]
    filled = np.full(present.shape, pad_id, np.int64)
    filled[present] = ids
    return filled, present.astype(np.int64)


def make_side(known: KnownModel, choice: Choice, device: str, threads: int, folder: Path) -> Side:
    """Load a side.

    Args:
        known: the model.
        choice: what it is made of.
        device: of torch.
        threads: that compute.
        folder: for what ours measures when it loads: what an earlier start found may come from a busy hour.

    Raises:
        Exception: whatever its library raises where it is missing or cannot load the model.
    """
    if choice.library == "openvino":
        from engine_openvino import OpenVino

        return OpenVino(known, choice, threads)
    if choice.library == "sentence-transformers":
        return SentenceTransformers(known, choice, device, threads)
    return Ours(known, choice, device, threads, folder)


class SentenceTransformers:
    """The library as its users have it: the model called with the features that its tokenizer would give."""

    ways = ("",)

    def __init__(self, known: KnownModel, choice: Choice, device: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._torch, self._known = torch, known
        self._model = SentenceTransformer(
            str(known.path),
            device=device,
            local_files_only=True,
            model_kwargs={"dtype": getattr(torch, choice.dtype)},
        ).eval()
        self._device = self._model.device
        self._takes = self._model.tokenizer.model_input_names

    def describe(self) -> dict[str, Any]:
        """See `Side`."""
        return {"dtype": str(next(self._model.parameters()).dtype).removeprefix("torch.")}

    def prepare(self, ids: Ids, lengths: Ids) -> Any:
        """See `Side`."""
        filled, mask = padded(ids, lengths, self._known.pad_id)
        features = {"input_ids": filled, "attention_mask": mask, "token_type_ids": np.zeros_like(filled)}
        return {
            name: self._torch.from_numpy(value).to(self._device)
            for name, value in features.items()
            if name in self._takes
        }

    def run(self, batches: Sequence[Any], way: str) -> list[Matrix]:
        """See `Side`."""
        with self._torch.inference_mode():
            return [self._model.forward(dict(batch))["sentence_embedding"].float().cpu().numpy() for batch in batches]

    def embed(self, texts: Sequence[str], budget: int, way: str, mean_tokens: float) -> Matrix:
        """See `Side`; a batch has as many rows as the budget holds of texts of the mean length."""
        rows = max(1, round(budget / mean_tokens))
        vectors = self._model.encode(list(texts), batch_size=rows, convert_to_tensor=True, show_progress_bar=False)
        matrix: Matrix = vectors.float().cpu().numpy()
        return matrix


class Ours:
    """The engine, as a consumer runs it."""

    ways = ("",)

    def __init__(self, known: KnownModel, choice: Choice, device: str, threads: int, folder: Path) -> None:
        import torch

        from embedstream.consumer.model import Model
        from embedstream.consumer.pooling import cut_and_normalize, pool
        from embedstream.shared.settings import Settings

        self._torch, self._pool, self._finish = torch, pool, cut_and_normalize
        asked = {"model": str(known.path), "dtype": choice.dtype, "device": device, "threads": threads}
        folders = {"measured_dir": folder / "measured", "compile_cache_dir": folder / "compiled"}
        settings = Settings.model_validate({**asked, **folders, "compile": choice.encoder == _COMPILED})
        self._model = Model.load(settings)
        if choice.encoder not in ("", _COMPILED):
            force(self._model, settings, choice.encoder)

    def describe(self) -> dict[str, Any]:
        """See `Side`."""
        return {
            "dtype": self._model.dtype,
            "why": self._model.dtype_reason,
            "encoder": self._model.encoder.name,
            "threads": self._torch.get_num_threads(),
        }

    def prepare(self, ids: Ids, lengths: Ids) -> Any:
        """See `Side`."""
        return ids, lengths

    def run(self, batches: Sequence[Any], way: str) -> list[Matrix]:
        """See `Side`."""
        return [self._vectors(*batch) for batch in batches]

    def _vectors(self, ids: Ids, lengths: Ids) -> Matrix:
        model = self._model
        with self._torch.inference_mode():
            hidden = model.forward(ids, lengths, model.recipe.default_adapter)
            there = self._torch.from_numpy(np.asarray(lengths, np.int64)).to(hidden.device)
            pooled = model.head(self._pool(model.recipe.pooling, hidden, there))
            vectors: Matrix = self._finish(pooled, None, model.recipe.normalize).cpu().numpy()
        return vectors

    def embed(self, texts: Sequence[str], budget: int, way: str, mean_tokens: float) -> Matrix:
        """See `Side`."""
        from embedstream.consumer.direct import Direct

        answer = Direct(self._model, budget).embed(texts)
        if answer.reasons:
            raise RuntimeError(f"no vector: {next(iter(answer.reasons.values()))}")
        return np.stack([vector for vector in answer.vectors if vector is not None])


def force(model: Any, settings: Any, name: str) -> None:
    """Let a loaded model compute with the encoder of a name, whatever it chose.

    It reaches for what is private of the model: nobody else has a reason to overrule the choice.

    Raises:
        ValueError: there is none of that name, or not for this model.
    """
    from embedstream.consumer.encoders.choice import CANDIDATES, Wanted
    from embedstream.consumer.encoders.padded import Padded

    makers = {"padded": lambda wanted: Padded(wanted.module), **dict(CANDIDATES)}
    if name not in makers:
        raise ValueError(f"no encoder {name}; there are {', '.join(makers)}")
    adapter = model.recipe.default_adapter
    encoder = makers[name](Wanted(model._modules[adapter], model.recipe.max_length, model.measured, settings))
    if encoder is None:
        raise ValueError(f"the encoder {name} is not for a {model.architecture}")
    model._encoders[adapter] = encoder
