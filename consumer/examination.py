"""A model examined: what its files say, how fast it is, and whether its vectors are what they should be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from embedstream.shared.recipe_files import transformer_folder
from embedstream.shared.settings import Dtype, Settings

from .agreement import HALF_COSINE, SAME, agreement
from .capacity import find_capacity
from .direct import Answer, Direct
from .facts import Facts, facts_of
from .model import Model
from .probe_texts import ProbeText, built_in
from .vocabulary import doubts_about

Tell = Callable[[str], None]
"""Told what is being done, for people who wait."""

_CHECKED = ("model.pooling_assumed", "model.tokenizer_doubtful", "library.log")
"""Warnings that checks tell in more words, and what libraries say to those who train."""
_QUERY = "What is the capital of France?"
_QUERY_RUNS = 5
_BATCH_LENGTH = 64
_BATCH_S = 5.0
_TIMED_RUNS = 2


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what it is.
        state: how it ended.
        found: what, in words.
        remedy: what to do about it, or "".
        numbers: the same for machines, where there are any.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Examination:
    """What was found so far.

    Args:
        facts: section -> name -> value.
        checks: in the order they were made.
        against: comparisons with sentence-transformers; none where they were not asked for.
    """

    facts: Facts
    checks: list[Check] = field(default_factory=list)
    against: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed; warnings are no failures."""
        return all(check.state is not State.FAILED for check in (*self.checks, *self.against))


@dataclass(frozen=True, slots=True)
class Examined:
    """A model in float32, with the texts it was tried with and what became of them.

    Args:
        model: loaded in float32.
        direct: embeds with it.
        texts: those with a vector.
        vectors: of each text alone, (dim,) or, of a model served per token, (tokens, dim).
    """

    model: Model
    direct: Direct
    texts: Sequence[ProbeText]
    vectors: Sequence[NDArray[Any]]


def examine(settings: Settings, tell: Tell) -> tuple[Examination, Examined]:
    """Load a model as a consumer would, time it, and check it.

    Args:
        settings: of the consumer.
        tell: told about each step.

    Raises:
        ModelLoadError: it cannot be served.
    """
    tell(f"loading {settings.model}")
    started_s = time.perf_counter()
    model = Model.load(settings)
    load_s = time.perf_counter() - started_s
    tell("finding out how many tokens make a batch")
    capacity = find_capacity(model, settings)
    budget = capacity.budget
    found = Examination(facts_of(model, settings, capacity))
    tell("timing it")
    found.facts["timings"] = {"load_s": round(load_s, 3), **_timings(model, budget)}
    found.checks += [_recipe_check(model, settings), _tokenizer_check(model)]
    probes = built_in(model.tokenizer, model.recipe.max_length)
    direct = Direct(model, budget)
    tell(f"embedding {len(probes)} texts, alone and together")
    alone, together = (_embed(direct, probes, alone=alone) for alone in (True, False))
    found.checks.append(_finite_check(probes, alone))
    kept = [place for place, vector in enumerate(alone.vectors) if vector is not None]
    texts = [probes[place] for place in kept]
    vectors = [vector for vector in alone.vectors if vector is not None]
    among = [vector for place in kept if (vector := together.vectors[place]) is not None]
    found.checks.append(_together_check(model.dtype, texts, vectors, among))
    if model.dtype == Dtype.FLOAT32:
        return found, Examined(model, direct, texts, vectors)
    dtype = model.dtype
    del model, direct  # its memory: there may not be room for two
    tell("loading it once more, in float32")
    exact_model = Model.load(settings.model_copy(update={"dtype": Dtype.FLOAT32}))
    exact_direct = Direct(exact_model, budget)
    tell(f"embedding {len(texts)} texts in float32")
    exact = [vector for vector in _embed(exact_direct, texts, alone=True).vectors if vector is not None]
    found.checks.append(_dtype_check(dtype, texts, vectors, exact))
    return found, Examined(exact_model, exact_direct, texts, exact)


def told_by_loader(warnings: Iterable[Mapping[str, Any]]) -> list[Check]:
    """A check for each warning that the log of a consumer would have, but for those that have a check of their own.

    Args:
        warnings: events of structlog; one that comes twice, because a model is loaded twice, counts once.
    """
    checks: dict[str, Check] = {}
    for warning in warnings:
        event = warning["event"]
        said = ", ".join(f"{name} {value}" for name, value in warning.items() if name not in ("event", "advice"))
        if event not in _CHECKED:
            checks[f"{event} {said}"] = Check(event, State.WARNING, said, str(warning.get("advice", "")))
    return [*checks.values()]


def _embed(direct: Direct, probes: Sequence[ProbeText], *, alone: bool) -> Answer:
    return direct.embed([probe.text for probe in probes], alone=alone)


def _timings(model: Model, budget: int) -> dict[str, float]:
    query = model.tokenizer.encode([_QUERY])
    row = np.resize(query.ids, min(_BATCH_LENGTH, model.recipe.max_length))

    def seconds(rows: int, ids: NDArray[np.uint32]) -> float:
        started_s = time.perf_counter()
        hidden = model.forward(np.tile(ids, rows), np.full(rows, len(ids)), model.recipe.default_adapter)
        hidden.sum().item()  # waits for the device
        return time.perf_counter() - started_s

    query_s = sorted(seconds(1, query.ids) for _ in range(_QUERY_RUNS))[_QUERY_RUNS // 2]
    row_s = max(1e-6, seconds(1, row))
    rows = max(1, min(budget // len(row), int(_BATCH_S / row_s)))
    batch_s = min(seconds(rows, row) for _ in range(_TIMED_RUNS))
    return {
        "query_ms": round(query_s * 1000, 2),
        "query_tokens": len(query.ids),
        "batch_ms": round(batch_s * 1000, 2),
        "batch_tokens": rows * len(row),
        "batch_length": len(row),
        "tokens_per_s": round(rows * len(row) / batch_s),
    }


def _recipe_check(model: Model, settings: Settings) -> Check:
    recipe = model.recipe
    name, found = "recipe", f"pooling {recipe.pooling_name} from {recipe.pooling_source}"
    if recipe.pooling_source == "modules.json":
        return Check(name, State.OK, found)
    if recipe.pooling_source == "override":
        return Check(name, State.WARNING, f"pooling {recipe.pooling_name} from --pooling, whatever the files say")
    return Check(
        name,
        State.WARNING,
        f"{found}: there is no modules.json, and nothing else says how the model was trained",
        "look at the model's page, and say how with --pooling; a sentence-transformers folder has modules.json",
    )


def _tokenizer_check(model: Model) -> Check:
    recipe, highest = model.recipe, model.tokenizer.vocab_size - 1
    found = f"the tokenizer's ids end at {highest}, the embeddings at {recipe.vocab_size - 1}"
    config = AutoConfig.from_pretrained(transformer_folder(model.files.path), local_files_only=True)
    doubts = [*doubts_about(model.tokenizer, recipe, config)]
    if not doubts:
        return Check("tokenizer", State.OK, found)
    remedy = "compare the tokenizer's files with those on the model's page"
    return Check("tokenizer", State.WARNING, "; ".join([found, *doubts]), remedy)


def _finite_check(probes: Sequence[ProbeText], answer: Answer) -> Check:
    empty = {place for place, ids in enumerate(answer.ids) if not len(ids)}
    bad = [place for place in answer.reasons if place not in empty]
    n_texts = len(probes) - len(empty)
    found = f"{n_texts - len(bad)} of {n_texts} built-in texts, up to {max(map(len, answer.ids))} tokens"
    if bad:
        first = f"{probes[bad[0]].name}: {answer.reasons[bad[0]]}"
        return Check("finite vectors", State.FAILED, f"{found}; {first}", "try --dtype float32; or the weights are bad")
    return Check("finite vectors", State.OK, found)


def _together_check(
    dtype: str, texts: Sequence[ProbeText], alone: Sequence[NDArray[Any]], together: Sequence[NDArray[Any]]
) -> Check:
    name = "alone and together"
    if len(together) != len(alone):
        return Check(name, State.FAILED, "a text that has a vector alone has none among others", "please report it")
    found = agreement(together, alone)
    at = texts[found.at].name
    if dtype == Dtype.FLOAT32:
        good, bound = found.error <= SAME, f"at most {SAME:g}"
        said = f"largest error {found.error:.1e}, {bound} allowed ({at})"
    else:
        good, bound = found.cosine >= HALF_COSINE, f"at least {HALF_COSINE:g}"
        said = f"least cosine {found.cosine:.6f}, {bound} wanted in {dtype} ({at})"
    if good:
        return Check(name, State.OK, said, numbers=found.numbers)
    remedy = "batches change this model's vectors: try --dtype float32, and report it"
    return Check(name, State.FAILED, said, remedy, found.numbers)


def _dtype_check(
    dtype: str, texts: Sequence[ProbeText], vectors: Sequence[NDArray[Any]], exact: Sequence[NDArray[Any]]
) -> Check:
    found = agreement(vectors, exact)
    said = (
        f"least cosine with float32 {found.cosine:.6f} ({texts[found.at].name}), mean {found.mean_cosine:.6f}; "
        f"at least {HALF_COSINE:g} wanted"
    )
    if found.cosine >= HALF_COSINE:
        return Check(dtype, State.OK, said, numbers=found.numbers)
    remedy = "serve it with --dtype float32, or with another half format"
    return Check(dtype, State.FAILED, said, remedy, found.numbers)
