"""What was measured when a model was loaded here before, kept on disk so that the next start need not measure again.

A measurement is good for the same weights on the same device, in the same number format, with as many threads and the
same versions of the libraries; with anything else it is another one. Each lies in a file of its own, so several
consumers that start at once never undo each other's. A damaged or unwritable folder only costs the measuring.
"""

from __future__ import annotations

import hashlib
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypeAlias

import orjson
import torch

from embedstream.shared.cache_folder import cache_folder
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings, flag_of

log = get_logger()

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
"""What JSON has."""

_VERSIONED = ("torch", "transformers", "embedstream")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LARGEST_BYTES = 64 * 1024


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in _VERSIONED)


class Measurements(Protocol):
    """Where measurements are looked up and left."""

    def get(self, name: str) -> Value:
        """What was measured under a name, or None where nothing was."""

    def put(self, name: str, value: Value) -> None:
        """Leave a measurement."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What measurements hang on.

    Args:
        weights: the model's revision: a commit, or a hash over all of its files.
        device: `cpu` or `cuda`, with the name of the chip and what it can do.
        dtype: number format of weights and forward pass; "" for what is measured to choose it.
        threads: of a forward pass on the CPU.
        versions: of the libraries, by name.
    """

    weights: str
    device: str
    dtype: str = ""
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=lambda: dict(_versions()))

    def as_json(self) -> dict[str, Value]:
        """As they are written beside each value."""
        return {**asdict(self), "versions": dict(self.versions)}

    @property
    def key(self) -> str:
        """16 hex digits that stand for them."""
        return hashlib.sha256(orjson.dumps(self.as_json(), option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


class Measured:
    """Measurements of one model under one set of conditions, on disk or, with no folder, in this process alone.

    Args:
        conditions: what they hang on.
        folder: for those of all models; None keeps nothing.
    """

    def __init__(self, conditions: Conditions, folder: Path | None) -> None:
        self.conditions = conditions
        self._folder = folder
        self._here: dict[str, Value] = {}
        self._told = False  # that nothing can be written

    @classmethod
    def of(cls, settings: Settings, weights: str, device: torch.device, threads: int, dtype: str = "") -> Measured:
        """As the settings say.

        Args:
            settings: whether measurements are kept, and where.
            weights: the model's revision.
            device: that computes.
            threads: of a forward pass on the CPU.
            dtype: number format, once it is chosen.
        """
        conditions = Conditions(weights, device_name(device), dtype, threads)
        folder = folder_of(settings) if settings.keep_measurements else None
        if folder is None and settings.keep_measurements:
            log.warning("measured.not_kept", reason="this user has no home folder", advice=flag_of("measured_dir"))
        return cls(conditions, folder)

    def with_dtype(self, dtype: str) -> Measured:
        """Those in a number format, which share nothing with those in another."""
        return Measured(replace(self.conditions, dtype=dtype), self._folder)

    def get(self, name: str) -> Value:
        """What was measured under these conditions, or None where nothing was, or it cannot be read.

        Args:
            name: of the measurement: lower-case letters, digits, `.`, `_` and `-`.
        """
        path = self._path(name)
        if name in self._here or self._folder is None:
            return self._here.get(name)
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise ValueError(f"larger than {_LARGEST_BYTES} bytes")
            read = orjson.loads(path.read_bytes())
            if read["conditions"] != self.conditions.as_json():
                raise ValueError("of other conditions")
            self._here[name] = read["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("measured.ignored", path=str(path), reason=str(error) or type(error).__name__)
            return None
        return self._here[name]

    def put(self, name: str, value: Value) -> None:
        """Keep a measurement; written aside and renamed, so that no reader meets half a file.

        Args:
            name: as for `get`.
            value: of numbers, texts, lists and objects of them; no larger than 60 KiB as JSON.

        Raises:
            TypeError: JSON has no such value.
        """
        data = orjson.dumps({"conditions": self.conditions.as_json(), "value": value}, option=orjson.OPT_INDENT_2)
        self._here[name] = value
        if self._folder is None:
            return
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as aside:  # nothing is left when renaming fails
                written = Path(aside) / path.name
                written.write_bytes(data)
                written.replace(path)
        except OSError as error:
            tell = log.debug if self._told else log.warning
            tell("measured.not_kept", path=str(path), reason=str(error))
            self._told = True

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"no name of a measurement: {name!r}")
        return (self._folder or Path()) / self.conditions.key / f"{name}.json"


def folder_of(settings: Settings) -> Path | None:
    """Where measurements of all models are kept; None where there is no place for them."""
    return settings.measured_dir or cache_folder("measured")


@cache
def device_name(device: torch.device) -> str:
    """What tells one kind of device from another: the chip's name and what it can do."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"cuda {found.name} {found.major}.{found.minor} {found.total_memory} bytes"
    return f"{device.type} {_cpu()}"


def _cpu() -> str:
    """The CPU's name, its kind, and a hash of its features: virtual machines often give many kinds the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    features = " ".join(sorted(named.get("flags", named.get("Features", "")).split()))
    name = named.get("model name", named.get("CPU part", platform.machine()))
    kind = f"{named.get('cpu family', '')}-{named.get('model', '')}"
    return (
        f"{name} {kind} {hashlib.sha256(features.encode()).hexdigest()[:8]} {torch.backends.cpu.get_cpu_capability()}"
    )
