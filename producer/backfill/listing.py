"""Which files an input path stands for, and in which order."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO
from urllib.parse import unquote

import pyarrow as pa

from embedstream.shared.errors import Misconfigured
from embedstream.shared.urls import without_secrets

from .input_formats import InputFormat, format_of, known_extensions, named
from .local_storage import LocalStorage
from .remote_storage import RemoteStorage
from .storage import Storage
from .trouble import explained

_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_NOT_DATA = ".md"
"""Folders of data sets have a README.md."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one file of the input is.

    Args:
        storage: holds it.
        key: its name there.
        path: as people are told.
        partition: what the names of its folders say, `year=2024` and the like; None for no value.
    """

    storage: Storage
    key: str
    path: str
    partition: Mapping[str, str | None] = field(default_factory=dict)

    def open(self) -> IO[bytes]:
        """Read it from front to end."""
        return self.storage.open(self.key)


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of an input, in their order, and what they are."""

    places: tuple[Place, ...]
    format: InputFormat


def list_files(path: str, format_name: str | None, leave_out: Sequence[str] = ()) -> Listing:
    """Find the files of an input.

    A path that exists is taken as it is, also where it looks like a pattern. In folders, what begins with `.` or `_`
    is left out, as is `*.md`.

    Args:
        path: a file, a folder, a pattern, or a URL of one of them.
        format_name: as the user says; None for what the names of the files tell.
        leave_out: files and folders, as people are told of them, that are not of the input though they lie within it.

    Raises:
        Misconfigured: there is no file, its format cannot be told, or there are files of several formats.
        Unavailable: a storage behind a URL has trouble.
    """
    wanted = None if format_name is None else named(format_name)
    storage, key = _storage_of(path)
    shown = without_secrets(path)
    with explained(shown):
        if storage.is_file(key):
            return _listing([Place(storage, key, storage.shown(key))], wanted)
        if storage.is_folder(key):
            if wanted in (None, InputFormat.DATASET) and storage.is_file(f"{key}/dataset_dict.json"):
                raise Misconfigured(_splits(storage, key, shown))
            if wanted in (None, InputFormat.DATASET) and storage.is_file(f"{key}/state.json"):
                return Listing(_dataset(storage, key, shown), InputFormat.DATASET)
            if wanted is InputFormat.DATASET:
                raise Misconfigured(f"{shown} has no state.json: it is no folder that `save_to_disk` wrote.")
            base, keys = key, storage.walk(key)
        elif glob.has_magic(key.partition("?")[0] if "://" in key else key):  # an address may have a query
            base, keys = _plain_start(key), storage.glob(key)
        else:
            raise Misconfigured(f"There is no {shown}.")
    within = tuple(f"{name}/" for name in leave_out if not f"{storage.shown(base)}/".startswith(f"{name}/"))
    places = [
        Place(storage, found, storage.shown(found), dict(_partition(found[len(base) :])))
        for found in sorted(keys, key=lambda name: PurePosixPath(name).parts)
        if not _left_out(found[len(base) :]) and not f"{storage.shown(found)}/".startswith(within)
    ]
    if not places:
        raise Misconfigured(f"There is no file in {shown}.")
    return _listing(places, wanted)


def partition_schema(places: Sequence[Place]) -> pa.Schema:
    """The columns that the names of folders tell: int32 where all values are such numbers, else strings."""
    names = dict.fromkeys(name for place in places for name in place.partition)
    return pa.schema([pa.field(name, _value_type({place.partition.get(name) for place in places})) for name in names])


def _storage_of(path: str) -> tuple[Storage, str]:
    """The storage of a path or URL, and the key of that path in it.

    Raises:
        Misconfigured: nothing that is installed knows such URLs.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" not in path:
        return LocalStorage(), os.path.abspath(path)  # noqa: PTH100 # a pattern is no path
    remote = RemoteStorage(path)
    return remote, remote.key


def _value_type(values: set[str | None]) -> pa.DataType:
    some = [value for value in values if value is not None]
    numbers = all(re.fullmatch(r"-?[0-9]{1,10}", value) and -(2**31) <= int(value) < 2**31 for value in some)
    return pa.int32() if some and numbers else pa.string()


def _listing(places: list[Place], wanted: InputFormat | None) -> Listing:
    if wanted is not None:
        return Listing(tuple(places), wanted)
    first: dict[InputFormat, Place] = {}
    for place in places:
        found = format_of(place.key)
        if found is None:
            raise Misconfigured(
                f"The name of {place.path} does not tell its format: name it with --format, or name the files to read "
                f"with a pattern. Known are {known_extensions()}."
            )
        first.setdefault(found, place)
    if len(first) > 1:
        (one, here), (other, there), *_ = first.items()
        raise Misconfigured(
            f"The input has files of several formats: {here.path} is {one}, {there.path} is {other}. Name those of one "
            "format with a pattern."
        )
    return Listing(tuple(places), next(iter(first)))


def _left_out(below: str) -> bool:
    names = [name for name in below.split("/") if name]
    hidden = any(name.startswith((".", "_")) and "=" not in name for name in names)
    return hidden or below.lower().endswith(_NOT_DATA)


def _partition(below: str) -> Iterator[tuple[str, str | None]]:
    for name in below.split("/")[:-1]:
        key, equals, value = name.partition("=")
        if equals and key:
            yield key, None if value == _NO_VALUE else unquote(value)


def _plain_start(pattern: str) -> str:
    """The folders in front of the first one that is a pattern."""
    plain = []
    for name in pattern.split("/")[:-1]:
        if glob.has_magic(name):
            break
        plain.append(name)
    return "/".join(plain)


def _dataset(storage: Storage, key: str, shown: str) -> tuple[Place, ...]:
    with explained(f"{shown}/state.json"), storage.open(f"{key}/state.json") as file:
        state = _json(file.read())
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise Misconfigured(f"{shown} is a selection of rows of other files: save it once more with `save_to_disk`.")
    names = [str(entry["filename"]) for entry in state.get("_data_files") or ()]
    if not names:
        raise Misconfigured(f"{shown}/state.json names no files.")
    return tuple(Place(storage, f"{key}/{name}", storage.shown(f"{key}/{name}")) for name in names)


def _splits(storage: Storage, key: str, shown: str) -> str:
    with storage.open(f"{key}/dataset_dict.json") as file:
        splits = _json(file.read()).get("splits", ())
    paths = ", ".join(f"{shown.rstrip('/')}/{name}" for name in splits)
    return f"{shown} holds several data sets; name one of them: {paths}"


def _json(data: bytes) -> dict[str, list[dict[str, str]]]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise OSError(f"no JSON: {error}") from error
    return value if isinstance(value, dict) else {}
