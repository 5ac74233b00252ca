"""The versions of packages that a model's authors ask for."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from .errors import ModelLoadError
from .json_files import shown

_ALIASES = {"pytorch": "torch"}
_NOT_USED = ("sentence-transformers", "sentence_transformers")
"""What the model was written for, but nothing here runs."""


def check_requirements(file: Path, requirements: object) -> None:
    """Refuse a model that needs another version of a package than is installed: with that its vectors may be others.

    Args:
        file: where they are listed, for the message.
        requirements: package name to the versions that will do (`">=5.15"`), or to a table that has them as `specifier`
            and may say why as `reason`.

    Raises:
        ModelLoadError: a package is missing or of another version, or the list is not understood.
    """
    if not requirements:
        return
    if not isinstance(requirements, dict):
        raise ModelLoadError(f"{file}: requirements is {shown(requirements)}, not a table of versions")
    for name, asked in requirements.items():
        package = str(_ALIASES.get(name, name))
        if package in _NOT_USED:
            continue
        wanted = asked.get("specifier", "") if isinstance(asked, dict) else asked
        reason = asked.get("reason", "") if isinstance(asked, dict) else ""
        try:
            versions = SpecifierSet(wanted, prereleases=True)
        except (InvalidSpecifier, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{file}: {shown(wanted)} of {shown(package)} names no versions") from error
        found = _installed(package)
        if found is None or not versions.contains(found):
            raise ModelLoadError(
                f"{file}: the model needs {shown(f'{package}{versions}')}, but {found or 'none'} is installed"
                + (f": {shown(reason)}" if reason else "")
            )


def _installed(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # the second of a name that none can have
        return None
