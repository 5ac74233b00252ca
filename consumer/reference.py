"""Our vectors beside those of sentence-transformers, of the same files and in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import Misconfigured
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import ROLE, Recipe
from embedstream.shared.settings import Settings, flag_of

from .adapters import find_adapters
from .agreement import REFERENCE, Agreement, agreement
from .backbone import first_line, quiet
from .examination import Check, Examined, State, Tell
from .model import Model

_EVERY = 4
"""Prompts, sizes and tokens are compared on each fourth text: what may go wrong there does not hang on the text."""
_SAME_DIRECTION = 1 - 1e-6
_NO_LIMIT = 10**9
_UNSCALED = (
    "the directions agree; without modules.json sentence-transformers does not scale vectors, and we scale them to "
    "unit length: --no-normalize leaves them as they are"
)
_OVERRIDES = ("pooling", "default_prompt_name", "default_task")
_OURS_DIFFER = "this is a defect of embedstream or a setting of yours; please report it with this page"


def require() -> None:
    """See that sentence-transformers is there.

    Raises:
        Misconfigured: it is not, naming what to install.
    """
    if find_spec("sentence_transformers") is None:
        raise Misconfigured(
            "sentence-transformers is not installed; --against needs `pip install sentence-transformers`"
        )


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to ask both sides for vectors."""

    name: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    function: str = "encode"
    every: int = _EVERY

    def adapter(self, recipe: Recipe) -> str:
        """What computes it, as a consumer chooses; "" for the bare model."""
        return recipe.adapter_of(self.ours.get("adapter", ""), self.ours.get("prompt", ""))


def compare(settings: Settings, examined: Examined, tell: Tell) -> list[Check]:
    """Embed the texts with sentence-transformers, one at a time, and compare.

    Args:
        settings: of the consumer; what overrides the files shows as a difference.
        examined: the model in float32.
        tell: told about each step.
    """
    tell("loading it with sentence-transformers")
    path = str(examined.model.files.path)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # of its imports and of the model's files, for those who train
        try:
            from sentence_transformers import SentenceTransformer

            load: Callable[[], Any] = partial(
                SentenceTransformer,
                path,
                device=str(examined.model.device),
                local_files_only=True,
                model_kwargs={"dtype": "float32"},
            )
            reference = load()
        except Exception as error:  # noqa: BLE001 (whatever it and transformers raise)
            found = f"sentence-transformers does not load {path}: {first_line(error)}"
            return [Check("loading", State.FAILED, found)]
        checks = [_limit_check(reference, examined.model.recipe, settings)]
        tell("comparing tokens")
        checks.append(_tokens_check(reference, examined, settings))
        recipe = examined.model.recipe
        ways = sorted(_ways(recipe, reference), key=lambda way: way.adapter(recipe))
        for adapter, of_adapter in groupby(ways, key=lambda way: way.adapter(recipe)):
            adapted = _with_adapter(load, examined.model, adapter, reference.max_seq_length) if adapter else reference
            for way in of_adapter:
                tell(f"comparing {way.name}")
                checks.append(_way_check(adapted, examined, way, settings))
    return checks


def _with_adapter(load: Callable[[], Any], model: Model, name: str, max_seq_length: int | None) -> Any:
    """Another one, that has the adapter alone: it is put on for good."""
    reference = load()
    (folder,) = (each.path for each in find_adapters(model.files.path) if each.name == name)
    reference.load_adapter(str(folder))
    reference.max_seq_length = max_seq_length
    return reference


def _ways(recipe: Recipe, reference: Any) -> Iterator[_Way]:
    yield _Way(
        "vectors of tokens",
        {"options": VectorOptions(per_token=True, normalize=False)},
        {"output_value": "token_embeddings"},
    )
    if recipe.per_token:
        return
    yield _Way("vectors", every=1)
    sizes = (recipe.dimension // 2,) if recipe.matryoshka_dims is None else recipe.matryoshka_dims
    for size in sorted(size for size in sizes if 0 < size < recipe.dimension)[-1:]:
        options = VectorOptions(dimensions=size, normalize=True)
        yield _Way(f"{size} components", {"options": options}, {"truncate_dim": size, "normalize_embeddings": True})
    for name, text in recipe.prompts.items():
        if text and name in reference.prompts:
            yield _Way(f"prompt {name}", {"prompt": name}, {"prompt_name": name})
    for adapter in recipe.adapters:
        yield _Way(f"adapter {adapter}", {"adapter": adapter})
    if recipe.prompts or recipe.adapters:
        for role in ("query", "document"):
            yield _Way(f"encode_{role}", {"prompt": f"{ROLE}{role}"}, function=f"encode_{role}")


def _way_check(reference: Any, examined: Examined, way: _Way, settings: Settings) -> Check:
    texts = examined.texts[:: way.every]
    encode: Callable[..., Any] = getattr(reference, way.function)
    ours = examined.direct.embed([text.text for text in texts], alone=True, **way.ours).vectors
    try:
        theirs = [_as_numpy(encode([text.text], show_progress_bar=False, **way.theirs)[0]) for text in texts]
    except Exception as error:  # noqa: BLE001 (model code runs here)
        return Check(way.name, State.FAILED, f"sentence-transformers fails at it: {first_line(error)}")
    missing = [text.name for text, vector in zip(texts, ours, strict=True) if vector is None]
    if missing:
        return Check(way.name, State.FAILED, f"we have no vector for {', '.join(missing)}", _OURS_DIFFER)
    mine = [vector for vector in ours if vector is not None]
    found = agreement(mine, theirs)
    if mine[found.at].shape != theirs[found.at].shape:
        size, other = ("x".join(map(str, vectors[found.at].shape)) for vectors in (mine, theirs))
        said = f"of the size {size}, and {other} with sentence-transformers ({texts[found.at].name})"
        return Check(way.name, State.FAILED, said, _of_overrides(settings), found.numbers)
    said = f"no difference, {len(texts)} texts"
    if found.error:
        at = texts[found.at].name
        said = f"largest error {found.error:.1e} ({at}), least cosine {found.cosine:.8f}, {len(texts)} texts"
    if found.error <= REFERENCE:
        return Check(way.name, State.OK, said, numbers=found.numbers)
    said = f"{said}; at most {REFERENCE:g} allowed"
    recipe = examined.model.recipe
    if found.cosine > _SAME_DIRECTION and recipe.pooling_source == "architecture default":
        return Check(way.name, State.WARNING, said, _UNSCALED, found.numbers)
    return Check(way.name, State.FAILED, said, _remedy(found, recipe, settings), found.numbers)


def _remedy(found: Agreement, recipe: Recipe, settings: Settings) -> str:
    if found.cosine > _SAME_DIRECTION:
        length = "unit length" if recipe.normalize else "the length the model gives them"
        return f"the directions agree, the lengths do not: ours have {length}; see --normalize"
    return _of_overrides(settings)


def _of_overrides(settings: Settings) -> str:
    """What an operator has set against the files is the likeliest cause of a difference."""
    given = [flag_of(name) for name in _OVERRIDES if getattr(settings, name) is not None]
    if not given:
        return _OURS_DIFFER
    one = len(given) == 1
    flags = " and ".join(given)
    return (
        f"{flags} {'overrides' if one else 'override'} the model's files: leave {'it' if one else 'them'} out unless "
        "you mean it"
    )


def _limit_check(reference: Any, recipe: Recipe, settings: Settings) -> Check:
    """Compare the longest input, and make both sides cut at the same place."""
    name, ours, theirs = "longest input", recipe.max_length, reference.max_seq_length
    reference.max_seq_length = ours
    if settings.max_model_len is not None:
        return Check(name, State.OK, f"{ours} tokens on both sides, as --max-model-len says")
    if theirs is None or theirs > _NO_LIMIT:
        return Check(name, State.OK, f"{ours} tokens; sentence-transformers has no limit of its own")
    if theirs == ours:
        return Check(name, State.OK, f"{ours} tokens on both sides")
    if theirs > ours:
        found = f"{ours} tokens, where the model ends or a job is full; sentence-transformers cuts at {theirs}"
        remedy = "texts between the two are refused or cut by us, and may fail with sentence-transformers"
        return Check(name, State.WARNING, found, remedy)
    return Check(name, State.FAILED, f"{ours} tokens; sentence-transformers cuts at {theirs}", _OURS_DIFFER)


def _tokens_check(reference: Any, examined: Examined, settings: Settings) -> Check:
    texts = examined.texts
    ours = examined.direct.embed([text.text for text in texts]).ids
    prompt = reference.prompts.get(reference.default_prompt_name)
    different = [
        text.name
        for text, ids in zip(texts, ours, strict=True)
        if ids.tolist() != _reference_ids(reference, text.text, prompt)
    ]
    if different:
        found = f"{len(different)} of {len(texts)} texts have other tokens: {', '.join(different[:5])}"
        return Check("tokens", State.FAILED, found, _of_overrides(settings))
    return Check("tokens", State.OK, f"the same for {len(texts)} texts")


def _reference_ids(reference: Any, text: str, prompt: str | None) -> list[int]:
    features = reference.preprocess([text], prompt=prompt)
    ids: list[int] = features["input_ids"][0][features["attention_mask"][0] != 0].tolist()
    return ids


def _as_numpy(vector: Any) -> NDArray[Any]:
    """Of a tensor on any device, or an array."""
    return np.asarray(vector.cpu() if hasattr(vector, "cpu") else vector)
