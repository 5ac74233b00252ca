"""Where a model's files are: a directory, an installed weights package, or the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from . import hub, weights_packages
from .errors import ModelLoadError
from .model_files import content_revision, digests_of, lfs_pointer
from .model_manifest import ModelManifest

_TRUE = {"1", "ON", "YES", "TRUE"}
"""How huggingface_hub reads its variables."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files on this machine.

    Args:
        path: the folder that holds `modules.json`, or `config.json` when there is none.
        revision: what they are: the commit on the Hub, or the first 16 hex digits of a hash over the files.
        origin: where they were found, and by what their hashes were checked, for people.
    """

    path: Path
    revision: str
    origin: str = ""


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
    if revision is None and any(package.installed for package in weights_packages.packages_of(model)):
        return
    hub_id = _hub_id_of(model)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        hub.snapshot(hub_id, revision, weights_packages.hint_for(model))


def locate(model: str, revision: str | None = None) -> ModelFiles:
    """Find a model's files: a directory, else an installed package, else the Hub's local cache, else the Hub.

    Args:
        model: a directory, the short name or Hub id of an installed weights package, or any Hub id.
        revision: branch, tag or commit on the Hub; then only the Hub will do, or a directory that `embedstream fetch`
            has made of that commit.

    Raises:
        ModelLoadError: nothing found, or the files are not what they must be; the message says what was tried and what
            to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder, revision)
        return _local(folder)
    packages = weights_packages.packages_of(model) if revision is None else ()
    for package in packages:
        if (installed := package.installed) is not None:
            _check_folder(installed, None)
            return _local(installed, package)
    path = hub.snapshot(_hub_id_of(model), revision, weights_packages.hint_for(model))
    return ModelFiles(path, path.name, "snapshot of the Hub")


def _hub_id_of(model: str) -> str:
    """What to ask the Hub for."""
    hub_id = weights_packages.hub_id_of(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ModelLoadError(
            f"no model {model!r}: there is no such directory, it is not the name of a weights package "
            f"({', '.join(weights_packages.short_names())}), and it has not the form owner/name of a Hub id"
        )
    return hub_id


def _check_folder(folder: Path, revision: str | None) -> None:
    if revision is not None:
        manifest = ModelManifest.read(folder)
        if manifest is None:
            raise ModelLoadError(f"{folder} is a directory: a revision ({revision}) only means something on the Hub")
        if manifest.revision != revision:
            raise ModelLoadError(f"{folder} holds revision {manifest.revision} of {manifest.source}, not {revision}")
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ModelLoadError(f"{folder} holds neither config.json nor modules.json: it is not a model's directory")


def _local(folder: Path, package: weights_packages.WeightsPackage | None = None) -> ModelFiles:
    try:
        digests = digests_of(folder)
        pointer = lfs_pointer(folder, digests)
    except OSError as error:
        raise ModelLoadError(f"the model's files cannot be read: {error}") from error
    if pointer is not None:
        raise ModelLoadError(
            f"{folder / pointer} is Git LFS's pointer to the file, not the file itself: run `git lfs pull` in the "
            "clone that it comes from"
        )
    path = folder.resolve()
    if package is not None:
        package.check(digests)
    manifest = ModelManifest.read(folder)
    if manifest is not None:
        manifest.check(folder, digests)
        return ModelFiles(
            path, manifest.revision, f"folder fetched from {manifest.source}, every sha256 as it was then"
        )
    origin = "folder" if package is None else f"package {package.requirement}, sha256 of the weights as on the Hub"
    return ModelFiles(path, content_revision(digests), origin)
