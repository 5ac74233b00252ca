"""Which files of a folder make a model, what they are together, and what a folder lacks to be one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "embedstream-model.json"
"""Written by `embedstream fetch` beside the files that it lists."""

PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What a model is made of; never its weights as a pickle."""
PICKLE = "pytorch_model.bin"
"""The weights of a small module such as Dense in models older than safetensors; read with `weights_only`."""
OTHER_RUNTIMES = ("onnx/*", "openvino/*", "coreml/*", "*.onnx")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")
"""What goes with a copy, and is no part of the model."""

_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_WEIGHTS = "model.safetensors"
_WITH_WEIGHTS = frozenset(("Dense", "LayerNorm"))
_WITH_CONFIG = _WITH_WEIGHTS | {"Pooling"}
_CHUNK_BYTES = 1024 * 1024
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # the most that Git LFS writes


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file holds: its size, and its sha256 in hex."""

    size_bytes: int
    sha256: str


def model_files(folder: Path) -> dict[str, Path]:
    """The files that make the model, weights included: name relative to the folder -> path, in the order of names."""
    found = {path.relative_to(folder).as_posix(): path for path in _candidates(folder)}
    return dict(sorted(found.items()))


def _candidates(folder: Path) -> Iterator[Path]:
    for pattern in PATTERNS:
        for path in folder.rglob(pattern):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != MANIFEST and not _is_apart(name):
                yield path
    for path in folder.rglob(f"*/{PICKLE}"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.with_name(_WEIGHTS).is_file() and not _is_apart(name):
            yield path


def _is_apart(name: str) -> bool:
    """Whether a file lies in a hidden folder, such as a cache, or is for another runtime."""
    return any(part.startswith(".") for part in name.split("/")) or any(fnmatch(name, each) for each in OTHER_RUNTIMES)


def belongs(name: str) -> bool:
    """Whether a file is one of a model, or goes with a copy, by its name alone."""
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in (*PATTERNS, *LICENCES))


def licences(folder: Path) -> dict[str, Path]:
    """The files that must go with a copy of the model."""
    return {path.name: path for pattern in LICENCES for path in folder.glob(pattern) if path.is_file()}


def digest_of(path: Path, read: Callable[[bytes], object] = len) -> FileDigest:
    """Hash a file: 1 GB takes about a second.

    Args:
        path: of the file.
        read: given each piece of it on the way.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := _piece_of(file):
            digest.update(piece)
            read(piece)
            size += len(piece)
    return FileDigest(size, digest.hexdigest())


def _piece_of(file: BinaryIO) -> bytes:
    try:
        return file.read(_CHUNK_BYTES)
    except OSError as error:
        error.filename = file.name  # of a file that could be opened they name none
        raise


def digests_of(folder: Path) -> dict[str, FileDigest]:
    """The digests of all files that make the model, by name.

    Raises:
        OSError: one cannot be read.
    """
    return {name: digest_of(path) for name, path in model_files(folder).items()}


def lfs_pointer(folder: Path, digests: dict[str, FileDigest]) -> str | None:
    """The first file that is only Git LFS's pointer to the real one, by name, or None.

    Args:
        folder: of the model.
        digests: of its files.

    Raises:
        OSError: a file cannot be read.
    """
    for name, digest in digests.items():
        if digest.size_bytes < _POINTER_BYTES and (folder / name).read_bytes().startswith(_POINTER):
            return name
    return None


def content_revision(digests: dict[str, FileDigest]) -> str:
    """What stands for the revision of a model without one: 16 hex digits over names and contents."""
    digest = hashlib.sha256()
    for name, file in sorted(digests.items()):
        digest.update(f"{name}\0{file.size_bytes}\0".encode())
        digest.update(bytes.fromhex(file.sha256))
    return digest.hexdigest()[:16]


def missing(folder: Path) -> str | None:
    """What a folder lacks to be a whole model in the layout of sentence-transformers: the name of a file, or None.

    Another program may have fetched a part of it: transformers leaves out `modules.json`, and without that the pooling
    would be a guess.
    """
    modules = _modules(folder)
    if modules is None:
        return "modules.json"
    for kind, place in modules:
        if kind == "Transformer" and (lacking := missing_of_transformer(folder / place)):
            return str(Path(place, lacking))
        if kind in _WITH_CONFIG and not (folder / place / "config.json").is_file():
            return f"{place}/config.json"
        if kind in _WITH_WEIGHTS and not any((folder / place / name).is_file() for name in (_WEIGHTS, PICKLE)):
            return f"{place}/{_WEIGHTS}"
    return None


def missing_of_transformer(folder: Path) -> str | None:
    """What lacks of the transformer itself and its tokenizer: the name of a file, or None."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not has_tokenizer(folder):
        return "tokenizer.json"
    return _missing_weights(folder)


def missing_of_adapters(folder: Path) -> list[str]:
    """The weights that lack of adapters, by name; there may never have been any but a pickle, as in e5-mistral."""
    weights = (config.with_name("adapter_model.safetensors") for config in folder.rglob("adapter_config.json"))
    return sorted(file.relative_to(folder).as_posix() for file in weights if not file.is_file())


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in any form: its settings alone are none."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


def _missing_weights(folder: Path) -> str | None:
    indexes = list(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return None if any(folder.glob("*.safetensors")) else _WEIGHTS
    for index in indexes:
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return index.name
        for shard in shards:
            if not (folder / shard).is_file():
                return str(shard)
    return None


def pickles_needed(folder: Path) -> list[str]:
    """The pickled weights to fetch: those of Dense and the like whose folder has no safetensors."""
    return [
        f"{place}/{PICKLE}"
        for kind, place in _modules(folder) or ()
        if kind in _WITH_WEIGHTS and place and not (folder / place / _WEIGHTS).is_file()
    ]


def _modules(folder: Path) -> list[tuple[str, str]] | None:
    """Class name and folder of each module; None without a readable `modules.json`."""
    try:
        listed: Any = json.loads((folder / "modules.json").read_bytes())
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in listed]
    except (OSError, ValueError, KeyError, TypeError):
        return None
