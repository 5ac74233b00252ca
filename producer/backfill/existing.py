"""Whether an output is there already."""

from __future__ import annotations

from pathlib import Path

from .outputs import Kind, Output
from .places import ObjectPlace


def holds_something(output: Output) -> bool | None:
    """Whether there is a file of its name, or a folder of it with anything in it; None for a database, which is shared.

    Raises:
        Misconfigured: the store behind its URL is not known, or its package is not installed.
        OSError: it cannot be looked at.
    """
    if output.kind not in {Kind.FILE, Kind.FOLDER}:
        return None
    if output.is_local:
        path = Path(output.location)
        return any(path.iterdir()) if path.is_dir() else path.exists()
    if output.kind is Kind.FOLDER:
        return bool(ObjectPlace(output.location).names())
    folder, _, name = output.location.rpartition("/")
    return name in ObjectPlace(folder).names()
