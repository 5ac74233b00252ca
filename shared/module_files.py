"""`modules.json`: the modules of a model in sentence-transformers' layout, in the order in which they run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from . import refusals
from .errors import ModelLoadError
from .json_files import exists, read_json, read_object, shown

_TRANSFORMER, _POOLING = "Transformer", "Pooling"
_AFTER_POOLING = ("Dense", "LayerNorm", "Normalize", "Dropout")


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of `modules.json`.

    Args:
        kind: last part of its class path: Transformer, Pooling, Dense, LayerNorm, Normalize or Dropout.
        folder: where its files are.
    """

    kind: str
    folder: Path

    @property
    def file(self) -> Path:
        """Its settings."""
        return self.folder / "config.json"


@dataclass(frozen=True, slots=True)
class Modules:
    """What `modules.json` lists.

    Args:
        file: the list itself.
        transformer: folder of `config.json`, weights and tokenizer: the model's own, or `0_Transformer` in old models.
        pooling: None where the list has none.
        head: what comes after the pooling.
        listed: whether there is a `modules.json` at all.
    """

    file: Path
    transformer: Path
    pooling: Module | None = None
    head: tuple[Module, ...] = ()
    listed: bool = True


def read_modules(path: Path) -> Modules:
    """The modules of a model; of one without `modules.json`, the transformer alone.

    Args:
        path: the model's folder.

    Raises:
        ModelLoadError: the list is damaged, or names what is not served.
    """
    file = path / "modules.json"
    if not exists(file):
        return Modules(file, path, listed=False)
    try:
        entries = [(str(entry["type"]), entry["path"], entry.get("name")) for entry in read_json(file)]
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelLoadError(f"{file} is not a list of modules with a type and a path") from error
    modules = [Module(kind, path / folder) for kind, folder in _checked(file, entries)]
    names = [name for _, _, name in entries if isinstance(name, str)]
    if len(names) > len(set(names)):
        raise ModelLoadError(f"{file}: two modules have the name {shown(Counter(names).most_common(1)[0][0])}")
    return _in_order(file, modules)


def _checked(file: Path, entries: list[tuple[str, Any, Any]]) -> list[tuple[str, str]]:
    """(kind, folder) of each entry."""
    checked = []
    for kind, folder, _ in entries:
        root, name = kind.partition(".")[0], kind.rpartition(".")[2]
        if root != "sentence_transformers" or name not in (_TRANSFORMER, _POOLING, *_AFTER_POOLING):
            config = read_object(file.parent / "config.json", missing_ok=True)
            raise ModelLoadError(f"{file}: the module {shown(kind)} is {refusals.of_module(kind, config)}")
        if not _beside(folder):
            raise ModelLoadError(f"{file}: the path {shown(folder)} does not name a folder beside it")
        checked.append((name, folder))
    return checked


def _beside(folder: object) -> bool:
    """Whether a path stays in the model's folder; by the rules of Windows, which know all separators there are."""
    path = PureWindowsPath(folder) if isinstance(folder, str) and folder.isprintable() else None
    return path is not None and not path.anchor and ".." not in path.parts


def _in_order(file: Path, modules: list[Module]) -> Modules:
    """One transformer, at most one pooling, and the others after it.

    A second pooling, or a Dense before it, would work on the vectors of tokens, as late interaction does.
    """
    kinds = [module.kind for module in modules]
    rest = modules[1:]
    pooling = rest.pop(0) if rest and rest[0].kind == _POOLING else None
    if kinds[:1] != [_TRANSFORMER] or any(module.kind not in _AFTER_POOLING for module in rest):
        raise ModelLoadError(f"{file}: the modules {shown(', '.join(kinds))} in this order make no vector of a text")
    return Modules(file, modules[0].folder, pooling, tuple(rest))
