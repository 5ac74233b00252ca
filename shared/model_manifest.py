"""The list that `embedstream fetch` leaves beside a model's files: where they came from, and what each must hold."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import orjson

from .errors import ModelLoadError
from .model_files import MANIFEST, FileDigest

_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """Where the files of a folder came from.

    Args:
        source: the model as it was asked for: a Hub id, a short name, or the name of a folder.
        revision: the commit on the Hub, or the hash over the files; it survives any copy of the folder.
        files: what each file that makes the model must hold, by name.
    """

    source: str
    revision: str
    files: dict[str, FileDigest]

    def write(self, folder: Path) -> None:
        """Put it beside the files.

        Raises:
            OSError: the folder cannot be written.
        """
        fields = {"version": _VERSION, "source": self.source, "revision": self.revision}
        fields["files"] = {name: asdict(digest) for name, digest in self.files.items()}
        (folder / MANIFEST).write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @classmethod
    def read(cls, folder: Path) -> ModelManifest | None:
        """That of a folder, or None where there is none.

        Raises:
            ModelLoadError: it is damaged, or of a newer version.
        """
        path = folder / MANIFEST
        try:
            fields = orjson.loads(path.read_bytes())
            if fields["version"] != _VERSION:
                raise ModelLoadError(f"{path} has version {fields['version']!r}; this embedstream reads {_VERSION}")
            files = {_name(name): FileDigest(**digest) for name, digest in fields["files"].items()}
            source, revision = fields["source"], fields["revision"]
            if not isinstance(source, str) or not re.fullmatch(r"[\w.-]{1,64}", revision):
                raise ValueError(f"source {source!r}, revision {revision!r}")
            return cls(source, revision, files)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{path} is damaged ({type(error).__name__}: {error}); fetch the model again into an empty folder, or "
                "remove this file to serve the folder as it is"
            ) from error

    def check(self, folder: Path, found: dict[str, FileDigest]) -> None:
        """Compare with what is there.

        Args:
            folder: to name in messages.
            found: the digests of its files.

        Raises:
            ModelLoadError: naming the first file that is missing, damaged, or not of the model.
        """
        how = f"fetch the model again into an empty folder, or remove {MANIFEST} to serve this one as it is"
        for name, digest in self.files.items():
            if name not in found:
                raise ModelLoadError(f"{folder / name} is missing; {how}")
            if found[name] != digest:
                raise ModelLoadError(
                    f"{folder / name} is damaged or was changed: it has {found[name].size_bytes} bytes and the sha256 "
                    f"{found[name].sha256[:16]}…, not {digest.size_bytes} and {digest.sha256[:16]}…; {how}"
                )
        if added := next((name for name in found if name not in self.files), None):
            raise ModelLoadError(f"{folder / added} was added to the model's files; {how}")


def _name(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"file {name!r}")
    return name
