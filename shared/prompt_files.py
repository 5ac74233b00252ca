"""`config_sentence_transformers.json`: prompts, the size vectors are cut to, and how they are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import refusals
from .errors import ModelLoadError
from .jobs import MAX_STRING_BYTES
from .json_files import integer, read_object, shown, text
from .recipe import NO_PROMPT, ROLE
from .requirement_files import check_requirements

_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_ALWAYS_THERE = ("query", "document")
"""Prompts that sentence-transformers has for every model; empty where the files have none."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What the file says of a model as a whole.

    Args:
        prompts: text put before each input, by the prompt's name.
        default_prompt: name of the one of texts that come without a choice, or "".
        truncate_dim: components that are left of a vector when nobody chooses; None for all.
        similarity: how vectors are compared.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    truncate_dim: int | None = None
    similarity: str = "cosine"


def read_model_settings(
    path: Path, config: dict[str, Any], default_prompt: str | None, *, listed: bool
) -> ModelSettings:
    """The file's settings; those of a model without `modules.json` are left out, as sentence-transformers does.

    Args:
        path: the model's folder.
        config: its `config.json`: Jina's models have their prompts there too.
        default_prompt: the operator's choice, "" for none; None leaves it to the file.
        listed: whether the model has a `modules.json`.

    Raises:
        ModelLoadError: the file is damaged, says something that is not understood, or is of a kind that is not served.
    """
    file = path / "config_sentence_transformers.json"
    fields = read_object(file, missing_ok=True)
    kind = fields.get("model_type") or "SentenceTransformer"
    if (what := refusals.of_family(kind if isinstance(kind, str) else ascii(kind))) is not None:
        raise ModelLoadError(f"{file}: the model is {what}")
    check_requirements(file, fields.get("requirements"))
    if not listed:
        fields = {}
    prompts = _prompts(file, "prompts", fields.get("prompts"))
    if not prompts:
        prompts = _prompts(path / "config.json", "task_instructions", config.get("task_instructions"))
    return ModelSettings(
        prompts,
        _default(file, fields, prompts, default_prompt),
        _truncate_dim(file, fields),
        _similarity(file, fields),
    )


def _prompts(file: Path, key: str, prompts: object) -> dict[str, str]:
    if prompts is None:
        return {}
    if not isinstance(prompts, dict):
        raise ModelLoadError(f"{file}: {key} is {shown(prompts)}, not a table of texts")
    for name in prompts:
        text(file, f"the name of a prompt in {key}", name)
        if name in ("", NO_PROMPT) or name.startswith(ROLE):
            raise ModelLoadError(f"{file}: no prompt may have the name {shown(name)}, which stands for a choice here")
        if len(name.encode()) > MAX_STRING_BYTES:
            raise ModelLoadError(f"{file}: the name of a prompt has more than {MAX_STRING_BYTES} bytes: {shown(name)}")
    return {
        name: "" if prompt is None else text(file, f"the prompt {shown(name)}", prompt)
        for name, prompt in prompts.items()
    }


def _default(file: Path, fields: dict[str, Any], prompts: Mapping[str, str], chosen: str | None) -> str:
    asked = fields.get("default_prompt_name") if chosen is None else chosen
    if not asked:
        return ""
    if isinstance(asked, str) and asked in prompts:
        return asked
    if chosen is None and asked in _ALWAYS_THERE:
        return ""
    source = f"{file}: default_prompt_name" if chosen is None else "--default-prompt-name"
    known = ", ".join(map(shown, prompts)) or "none"
    raise ModelLoadError(f"{source} is {shown(asked)}, but the model has no such prompt; it has {known}")


def _truncate_dim(file: Path, fields: dict[str, Any]) -> int | None:
    size = integer(file, fields, "truncate_dim")
    if size is not None and size < 1:
        raise ModelLoadError(f"{file}: truncate_dim is {size}, not a size")
    return size


def _similarity(file: Path, fields: dict[str, Any]) -> str:
    similarity = fields.get("similarity_fn_name") or "cosine"
    if similarity not in _SIMILARITIES:
        known = ", ".join(_SIMILARITIES)
        raise ModelLoadError(f"{file}: similarity_fn_name is {shown(similarity)}, which is none of {known}")
    return str(similarity)
