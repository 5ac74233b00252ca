"""Task adapters: small weights (LoRA) beside a model's own, one set for each kind of request."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.json_files import read_object
from embedstream.shared.logs import get_logger

from .backbone import POOLER, first_line

log = get_logger()

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PLACES = (f"*/{_CONFIG}", f"*/*/{_CONFIG}")
"""Folders with adapters lie in the model's folder, or together in a folder of it."""
_TASKS = {
    "retrieval_query": "retrieval.query",
    "retrieval_passage": "retrieval.passage",
    "text_matching": "text-matching",
}
"""Folders of jina-embeddings-v3-hf, and what its tasks are called elsewhere: in its prompts and by its clients."""
_NAME = "task_adapter"
"""What peft calls each of them: it looks for the name among those of tensors, and a folder may be called anything."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """Where the files of an adapter are.

    Args:
        name: what clients call it.
        path: the folder that holds its configuration and weights.
    """

    name: str
    path: Path


def find_adapters(folder: Path) -> tuple[AdapterFolder, ...]:
    """The adapters of a model, sorted by name; those without weights that may be loaded are left out, with a warning.

    Args:
        folder: of the model.

    Raises:
        ModelLoadError: two of one name, one that is no LoRA; or peft is not installed.
    """
    found: dict[str, AdapterFolder] = {}
    for path in sorted(file.parent for place in _PLACES for file in folder.glob(place)):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        name = _TASKS.get(path.name, path.name)
        if not (path / _WEIGHTS).is_file():  # e5-mistral has one beside its own weights, which it is part of
            log.warning("adapter.left_out", adapter=name, path=str(path), reason=f"no {_WEIGHTS}")
            continue
        if name in found:
            raise ModelLoadError(f"two adapters of {folder} have the name {name}: {found[name].path} and {path}")
        _check_kind(path)
        found[name] = AdapterFolder(name, path)
    if found and find_spec("peft") is None:
        raise ModelLoadError(
            f"{folder} has adapters ({', '.join(sorted(found))}), and peft is not installed to load them: "
            "pip install '.[consumer]' in embedstream's folder"
        )
    return tuple(found[name] for name in sorted(found))


def default_of(asked: str | None, adapters: Iterable[AdapterFolder]) -> str:
    """Name of the adapter of requests that choose none, "" for the bare model.

    Args:
        asked: for it by the operator: the adapter's name, or its folder's.
        adapters: there are.

    Raises:
        ModelLoadError: there is no such adapter.
    """
    if asked is None:
        return ""
    names = [adapter.name for adapter in adapters]
    name = _TASKS.get(asked, asked)
    if name not in names:
        raise ModelLoadError(
            f"--default-task {asked}: the model has " + (f"the adapters {', '.join(names)}" if names else "no adapters")
        )
    return name


def with_adapters(module: torch.nn.Module, adapters: Iterable[AdapterFolder]) -> Mapping[str, torch.nn.Module]:
    """The module once more for each adapter, all on the same weights.

    So a change of the adapter is the choice of another module, and the bare one does not know of any. Switching inside
    one module takes 10 to 20 ms for 24 layers: peft sets flags on each adapter's tensors in each layer.

    Args:
        module: transformers' own, on its device and in its number format, in evaluation mode.
        adapters: at most a few dozen.

    Returns:
        Name -> module. Only what the adapter adds needs memory.

    Raises:
        ModelLoadError: an adapter is damaged or of another model.
    """
    return {adapter.name: _adapted(module, adapter) for adapter in adapters}


def _adapted(module: torch.nn.Module, adapter: AdapterFolder) -> torch.nn.Module:
    adapted: Any = _on_same_weights(module)
    try:
        report = adapted.load_adapter(
            str(adapter.path),
            adapter_name=_NAME,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the report names them in plainer words than the exception
            adapter_kwargs={"local_files_only": True},  # its own argument of this name ends in an error, in 5.23
        )
    except Exception as error:  # peft, transformers, safetensors and torch each raise their own kinds
        raise ModelLoadError(f"the adapter in {adapter.path} cannot be loaded: {first_line(error)}") from error
    lacking = sorted((*report.missing_keys, *(key for key, *_ in report.mismatched_keys)))
    left_out = sorted(key for key in report.unexpected_keys if not key.startswith(POOLER))
    if lacking:
        others = f"; it has others, such as {left_out[0]}" if left_out else ""
        if any(".lora_magnitude_vector." in key for key in lacking):
            others = (
                f"; it is DoRA, which transformers {transformers.__version__} does not read: merge it into the model"
            )
        raise ModelLoadError(
            f"the adapter in {adapter.path} lacks {len(lacking)} tensors that fit {type(module).__name__} and its "
            f"{_CONFIG}, such as {lacking[0]}{others}"
        )
    if left_out:
        log.warning("adapter.tensors_left_out", adapter=adapter.name, tensors=len(left_out), first=left_out[0])
    module_with: torch.nn.Module = adapted.eval()
    return module_with


def _on_same_weights(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose layers may be changed, with the tensors and the configuration of the original."""
    config: Any = module.config
    shared = [*module.parameters(), *module.buffers(), config]
    return copy.deepcopy(module, {id(each): each for each in shared})


def _check_kind(folder: Path) -> None:
    """Refuse what peft would load another way."""
    kind = read_object(folder / _CONFIG).get("peft_type")
    if kind != "LORA":
        raise ModelLoadError(f"the adapter in {folder} is of the type {kind!r}; only LORA is supported")
