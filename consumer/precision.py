"""Whether a half format is good enough for a model: its vectors of some texts beside those it has in float32.

The formats differ little from model to model, but some models have values that float16 cannot hold, or layers that
make much of what bfloat16 rounds away. Nobody would see it in the vectors. So a half format is tried before it is
served, once for the same weights on the same device.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.logs import get_logger
from embedstream.shared.recipe import Recipe
from embedstream.shared.tokenization import TextTokenizer

from . import allocator
from .agreement import HALF_COSINE, agreement
from .encoders.encoder import Ids
from .faults import Fault, fault_of
from .formats import Format
from .measured import Measurements, Value
from .pooling import cut_and_normalize, pool
from .probe_texts import few_texts

log = get_logger()

HALF_ORDER = 0.99
"""Least rank correlation between the similarities of all pairs of texts in a half format and those in float32.

Where a model's vectors all lie close together, a cosine of 0.999 with the right one is no merit: its neighbours may be
others. All-MiniLM-L6-v2 has 0.9997 in bfloat16."""

PROBES = few_texts()
"""Name -> text: what is embedded."""
Vectors = Mapping[str, NDArray[np.float32]]
"""By the text's name (dim,) or, of a model served per token, (tokens, dim)."""
M = TypeVar("M")


class Computes(Protocol):
    """What a model's vectors are made with."""

    tokenizer: TextTokenizer
    head: Callable[[Tensor], Tensor]

    @property
    def recipe(self) -> Recipe:
        """How hidden states become vectors."""

    def forward(self, ids: Ids, lengths: Ids, adapter: str = "") -> Tensor:
        """(total, dim) hidden states of sequences that follow one another."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a model's vectors in a half format compare with those in float32.

    Args:
        n_texts: that were compared.
        cosine: the least between a text's two vectors; -1 where a vector is not finite.
        order: rank correlation of the similarities of all pairs of texts; 1 for a model served per token.
        at: the text with the least cosine, or the first whose vector is not finite.
    """

    n_texts: int
    cosine: float
    order: float
    at: str

    @property
    def passed(self) -> bool:
        """Whether the model may be served in this format without being asked for."""
        return self.cosine >= HALF_COSINE and self.order >= HALF_ORDER

    def __str__(self) -> str:
        if self.cosine < 0:
            return f"values that are not numbers ({self.at})"
        least = f"{self.n_texts} probe texts, least cosine {_floor(self.cosine, 5)}"
        if self.cosine < HALF_COSINE:
            return f"{least} ({self.at}), at least {HALF_COSINE:g} wanted"
        if self.order < HALF_ORDER:
            return f"{least}, order of neighbours {_floor(self.order, 3)}, at least {HALF_ORDER:g} wanted"
        return least

    @classmethod
    def remembered(cls, value: Value) -> Verdict | None:
        """What `as_value` was made of, or None of anything else."""
        match value:
            case {"n_texts": int(n_texts), "cosine": float(cosine), "order": float(order), "at": str(at)}:
                return cls(n_texts, cosine, order, at)
        return None

    def as_value(self) -> Value:
        """As it is kept."""
        return asdict(self)


def vectors_of(model: Computes, *, alone: bool) -> Vectors:
    """Vectors of `PROBES` by the whole way that those of requests go, but for texts that read the same as others.

    Args:
        model: that computes them, with its default adapter.
        alone: whether each has a forward pass of its own; else they share one, the longest first as in batches.
    """
    read = {
        name: model.tokenizer.encode([text], truncate_to=model.recipe.max_length).ids for name, text in PROBES.items()
    }
    different = {ids.tobytes(): (name, ids) for name, ids in reversed(read.items()) if len(ids)}
    rows = sorted(different.values(), key=lambda row: len(row[1]), reverse=True)
    found: dict[str, NDArray[np.float32]] = {}
    for batch in [[row] for row in rows] if alone else [rows]:
        names, ids = zip(*batch, strict=True)
        found |= zip(names, _embed(model, ids), strict=True)
    return found


def compare(vectors: Vectors, exact: Vectors) -> Verdict:
    """Judge vectors in a half format.

    Args:
        vectors: in the half format, of one text at least.
        exact: of the same texts in float32.
    """
    not_finite = [name for name, vector in vectors.items() if not np.isfinite(vector).all()]
    if not_finite:
        return Verdict(len(vectors), -1.0, -1.0, not_finite[0])
    cosines = {name: agreement([vector], [exact[name]]).cosine for name, vector in vectors.items()}
    worst = min(cosines, key=lambda name: cosines[name])
    order = _same_order([*vectors.values()], [exact[name] for name in vectors])
    return Verdict(len(vectors), max(0.0, cosines[worst]), order, worst)


@dataclass(frozen=True, slots=True)
class Check(Generic[M]):
    """What it takes to check a model in a half format.

    Args:
        name: under which verdicts are kept; another one where other vectors would be compared.
        exact: makes their vectors in float32, and leaves nothing of that in memory.
        vectors: makes those of a model that is loaded.
        kept: verdicts of earlier starts in a format, by its name.
        skipped: says why nothing is to be checked, or "".
    """

    name: str
    exact: Callable[[], Vectors]
    vectors: Callable[[M], Vectors]
    kept: Callable[[str], Measurements]
    skipped: Callable[[], str]


def settle(formats: Sequence[Format], check: Check[M], load: Callable[[torch.dtype], M]) -> tuple[M, str]:
    """Load a model in the first format that is good enough for it.

    Args:
        formats: the best first. The last is taken in any case; if it is a half one, with a warning.
        check: of half formats.
        load: loads the model and runs it once; the one before is gone by then.

    Returns:
        The model, and for people why it has this format.

    Raises:
        ModelLoadError: it cannot be loaded in the last format.
    """
    refused: list[str] = []
    trial = _Trial(check, load)
    for chosen in formats[:-1]:
        model, found = trial.run(chosen)
        if model is not None:
            return model, "; ".join([chosen.reason, *refused, found])
        refused.append(f"not {chosen.name}: {found}")
        log.warning("model.format_refused", dtype=chosen.name, reason=found)
    last = formats[-1]
    if last.dtype is torch.float32:
        return load(last.dtype), "; ".join([last.reason, *refused])
    return trial.insist(last)


class _Trial(Generic[M]):
    """Tries formats; the vectors in float32 are made when the first one needs them."""

    def __init__(self, check: Check[M], load: Callable[[torch.dtype], M]) -> None:
        self._check = check
        self._load = load
        self._exact: Vectors | None = None
        self._skipped = ""

    def run(self, chosen: Format) -> tuple[M | None, str]:
        """The model, or None where this format does not do, and what was found."""
        verdict = self._remembered(chosen)
        if verdict is not None and not verdict.passed:
            return None, str(verdict)
        exact = None if verdict else self._in_float32()  # a fault of the files shows here, not as one of the format
        try:
            model = self._load(chosen.dtype)
        except ModelLoadError as error:  # no kernel for this format, or no finite values; memory may be there next time
            _forget()
            return None, str(error)
        verdict = verdict or self._judge(chosen, model, exact)
        if verdict is None:
            return model, f"not checked: {self._skipped}"
        if verdict.passed:
            return model, str(verdict)
        del model
        _forget()
        return None, str(verdict)

    def insist(self, chosen: Format) -> tuple[M, str]:
        """The model in a half format that was asked for."""
        verdict = self._remembered(chosen)
        exact = None if verdict else self._in_float32()
        model = self._load(chosen.dtype)
        verdict = verdict or self._judge(chosen, model, exact)
        if verdict is None:
            return model, f"{chosen.reason}; not checked: {self._skipped}"
        if not verdict.passed:
            log.warning("model.format_inexact", dtype=chosen.name, reason=str(verdict), advice="--dtype float32")
        return model, f"{chosen.reason}; {verdict}"

    def _remembered(self, chosen: Format) -> Verdict | None:
        return Verdict.remembered(self._check.kept(chosen.name).get(self._check.name))

    def _judge(self, chosen: Format, model: M, exact: Vectors | None) -> Verdict | None:
        if exact is None:
            return None
        verdict = compare(self._check.vectors(model), exact)
        self._check.kept(chosen.name).put(self._check.name, verdict.as_value())
        return verdict

    def _in_float32(self) -> Vectors | None:
        if self._exact is None and not self._skipped:
            self._skipped = self._check.skipped()
        if self._exact is None and not self._skipped:
            try:
                self._exact = self._check.exact()
            except Exception as error:
                if fault_of(error.__cause__ or error) is not Fault.MEMORY:
                    raise
                self._skipped = "no memory for the weights in float32"
            _forget()
        return self._exact


def _forget() -> None:
    """Give memory back before the next copy of the weights is loaded; modules may stand in cycles."""
    gc.collect()
    torch.cuda.empty_cache()
    allocator.give_back()


def _embed(model: Computes, sequences: Sequence[NDArray[np.uint32]]) -> list[NDArray[np.float32]]:
    recipe = model.recipe
    lengths = np.array([len(ids) for ids in sequences])
    with torch.inference_mode():
        hidden = model.forward(np.concatenate(sequences), lengths, recipe.default_adapter)
        pooled = pool(recipe.pooling, hidden, torch.from_numpy(lengths).to(hidden.device))
        if recipe.per_token:
            vectors = cut_and_normalize(pooled, None, normalize=True).cpu().numpy()
            return np.split(vectors, np.cumsum(lengths)[:-1])
        return [*cut_and_normalize(model.head(pooled), None, recipe.normalize).cpu().numpy()]


def _floor(value: float, digits: int) -> str:
    """Rounded down: what is refused must not look like what is wanted."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"


def _same_order(vectors: Sequence[NDArray[np.float32]], exact: Sequence[NDArray[np.float32]]) -> float:
    """Rank correlation of the similarities of all pairs; 1 where there is no order to be had."""
    if len(vectors) < 3 or vectors[0].ndim > 1:  # two texts are one pair
        return 1.0
    ranks = [np.argsort(np.argsort(_similarities(each))).astype(np.float64) for each in (vectors, exact)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _similarities(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """(pairs,) cosines of all pairs of different vectors."""
    matrix = np.stack(vectors).astype(np.float64)
    unit = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    pairs: NDArray[np.float64] = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    return pairs
