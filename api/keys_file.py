"""The file of `--api-keys-file`: which keys there are, on which lane, with which quota. `docs/keys.md` has its form.

The file is checked whole before any of it counts: a key that half of a file grants would be as bad as one that it
forgets. Messages name the place in the file and the field, never a value: it may be a key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from embedstream.shared.errors import Misconfigured
from embedstream.shared.lanes import LANES

from .context import Caller

DEFAULT_BURST_S = 10
"""Without `burst_tokens`, a quota holds what it grows by in this many seconds."""
FLAG_NAMES = "api-key-"
"""How the names of the keys begin that `--api-key` gives; the file has names of its own."""

_FIELDS = ("key", "sha256", "lane", "tokens_per_s", "burst_tokens")
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_MOST_TOKENS = 1e12  # up to here doubles count to thousandths


def read(path: Path) -> dict[bytes, Caller]:
    """The keys of a file.

    Returns:
        For the SHA-256 of each key, whose it is.

    Raises:
        Misconfigured: the file cannot be read, or is not understood.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at .*\)$", str(error))  # the rest of the message may quote the file
        raise Misconfigured(f"{path} is not TOML {place[0] if place else ''}".rstrip() + ".") from None
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{path} is not UTF-8 (at byte {error.start}).") from None
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read: {error.strerror or type(error).__name__}.") from None
    try:
        return _callers(content)
    except _WrongError as error:
        raise Misconfigured(f"{path}: {error}") from None


class _WrongError(Exception):
    """What is wrong with the file, as a sentence."""


def _callers(content: Mapping[str, Any]) -> dict[bytes, Caller]:
    entries = content.get("keys")
    # A file that was cut short while it is written must not close the doors: `[keys]` alone says that there are none.
    if not isinstance(entries, dict):
        raise _WrongError("there is no table `keys`; each key is a table `[keys.NAME]`.")
    if content.keys() != {"keys"}:
        raise _WrongError("something stands beside the table `keys`; each key is a table `[keys.NAME]`.")
    callers: dict[bytes, Caller] = {}
    for place, (name, fields) in enumerate(entries.items(), 1):
        if not _NAME.fullmatch(name) or name.startswith(FLAG_NAMES):
            raise _WrongError(
                f"the name of entry {place} must have 1 to 64 letters, digits, `_`, `.` or `-`, and not begin with "
                f"`{FLAG_NAMES}`."
            )
        digest = _digest(name, fields)
        if digest in callers:
            raise _WrongError(f"`{callers[digest].name}` and `{name}` have the same key.")
        callers[digest] = _caller(name, fields)
    return callers


def _digest(name: str, fields: object) -> bytes:
    if not isinstance(fields, dict):
        raise _WrongError(f"`{name}` is not a table; each key is a table `[keys.NAME]`.")
    if unknown := sorted(fields.keys() - set(_FIELDS)):
        known = ", ".join(f"`{field}`" for field in _FIELDS)
        # Only what resembles a field is repeated: anything else may be a key that went astray.
        misspelt = next((field for field in unknown if get_close_matches(field, _FIELDS)), None)
        which = "a field that" if misspelt is None else f"the field `{misspelt}`, which"
        raise _WrongError(f"`{name}` has {which} is none of {known}.")
    key, digest = fields.get("key"), fields.get("sha256")
    if (key is None) == (digest is None):
        raise _WrongError(f"`{name}` needs one of `sha256` and `key`.")
    if digest is not None:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _WrongError(f"`sha256` of `{name}` must have 64 hexadecimal digits.")
        return bytes.fromhex(digest)
    # A header's value is stripped on its way: such a key would never match.
    if not isinstance(key, str) or not key or key != key.strip() or not key.isprintable():
        raise _WrongError(f"`key` of `{name}` must be printable characters, with no blank at the ends.")
    return sha256(key.encode()).digest()


def _caller(name: str, fields: Mapping[str, object]) -> Caller:
    lane = next((each for each in LANES if each == fields.get("lane")), None)
    if lane is None and "lane" in fields:
        raise _WrongError(f"`lane` of `{name}` must be one of {', '.join(f'`{each}`' for each in LANES)}.")
    tokens_per_s, burst_tokens = _number(name, fields, "tokens_per_s"), _number(name, fields, "burst_tokens")
    if tokens_per_s is None:
        if burst_tokens is not None:
            raise _WrongError(f"`{name}` has `burst_tokens` and no `tokens_per_s`.")
        return Caller(name, lane)
    burst_tokens = max(1.0, tokens_per_s * DEFAULT_BURST_S) if burst_tokens is None else burst_tokens
    return Caller(name, lane, tokens_per_s, burst_tokens)


def _number(name: str, fields: Mapping[str, object], field: str) -> float | None:
    value = fields.get(field)
    if value is None:
        return None
    least = 1.0 if field == "burst_tokens" else 0.001  # tokens are counted whole
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _MOST_TOKENS:
        raise _WrongError(f"`{field}` of `{name}` must be a number from {least:g} to {_MOST_TOKENS:g}.")
    return float(value)
