"""On what a measurement was made: for the head of its results."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FEATURES = (
    "amx_bf16",
    "amx_fp16",
    "amx_tile",
    "avx512_bf16",
    "avx512_fp16",
    "avx512f",
    "avx2",
    "bf16",
    "sve",
    "asimd",
)
_FOR_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """As the CPU calls itself, and the family and model: virtual machines often give many kinds the same name."""
    name = _field("model name") or platform.processor() or platform.machine()
    family, model = _field("cpu family"), _field("model")
    return f"{name} of family {family}, model {model}" if family and model else name


def cpu_features() -> list[str]:
    """Its instructions that matter to matrices, in the kernel's names; none where the system does not tell."""
    flags = {*(_field("flags") or _field("Features")).split()}
    return [name for name in _FEATURES if name in flags]


def has_bfloat16(features: Iterable[str]) -> bool:
    """Whether a CPU with such instructions multiplies bfloat16 by itself: else it is emulated, and slow."""
    return any(name in _FOR_BFLOAT16 for name in features)


def cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def versions(packages: Iterable[str]) -> str:
    """Of the packages that are installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def setting(packages: Iterable[str]) -> str:
    """Date, CPU, its instructions, load and versions, in one sentence."""
    features = ", ".join(cpu_features()) or "features unknown"
    return (
        f"{date.today():%Y-%m-%d}, {cores()} cores of {cpu_name()} ({features}), load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}, {versions(packages)}."
    )


def _field(name: str) -> str:
    if not CPUINFO.exists():
        return ""
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
