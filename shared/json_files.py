"""Reading the JSON files of a model: whatever is wrong with one is a single line that names it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import ModelLoadError

_SHOWN_CHARS = 100
_LARGEST_SIZE = 2**31


def exists(file: Path) -> bool:
    """Whether there is such a file; a name that no file can have is one that there is not."""
    return os.path.isfile(file)  # noqa: PTH113 (Path.is_file raises on names that are too long)


def read_json(file: Path) -> Any:
    """What a file holds.

    Raises:
        ModelLoadError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{file} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is damaged: {error}") from error


def read_object(file: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The fields of a JSON object in a file.

    Args:
        file: its path.
        missing_ok: a file that there is not has no fields.

    Raises:
        ModelLoadError: it is missing, damaged or holds something else.
    """
    if missing_ok and not exists(file):
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} is damaged: it holds no JSON object")
    return value


def integer(file: Path, fields: dict[str, Any], key: str) -> int | None:
    """A whole number of a file, which some programs write as `512.0`; None where it is null or not there.

    Raises:
        ModelLoadError: it is no number.
    """
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ModelLoadError(f"{file}: {key} is {shown(value)}, not a number")
    return int(value)


def size(file: Path, fields: dict[str, Any], key: str) -> int:
    """A number of components.

    Raises:
        ModelLoadError: it is missing, no number, or none that anything here can have.
    """
    value = integer(file, fields, key)
    if value is None or not 1 <= value <= _LARGEST_SIZE:
        raise ModelLoadError(f"{file}: {key} is {shown(fields.get(key))}, not a size")
    return value


def boolean(file: Path, fields: dict[str, Any], key: str, *, default: bool) -> bool:
    """A truth value of a file.

    Raises:
        ModelLoadError: it is something else.
    """
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise ModelLoadError(f"{file}: {key} is {shown(value)}, neither true nor false")
    return value


def text(file: Path, key: str, value: object) -> str:
    """A text of a file, which must be one that can be stored.

    Raises:
        ModelLoadError: it is something else, or holds half of a character.
    """
    if not isinstance(value, str):
        raise ModelLoadError(f"{file}: {key} is {shown(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ModelLoadError(f"{file}: {key} is {shown(value)}, which is no Unicode text") from error
    return value


def shown(value: object) -> str:
    """A value in a message: as it is written, cut when it is long."""
    written = ascii(value)
    return written if len(written) <= _SHOWN_CHARS else f"{written[:_SHOWN_CHARS]}…"
