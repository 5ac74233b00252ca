"""How much memory there is: for another copy of a model's weights, or for batches; and what this process has taken."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from . import cgroups

_LIMITS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Controller, and names of limit, usage and pages of files, in control groups of version 2 and 1."""
_MEMINFO = Path("/proc/meminfo")
_OWN = Path("/proc/self")
_FLOAT32_BYTES = 4


def float32_bytes(folder: Path) -> int:
    """Bytes of all weights in a folder, were they in float32.

    Args:
        folder: with `model.safetensors`, whole or in shards; only their headers are read.

    Raises:
        SafetensorError: a file is damaged.
    """
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
    return total * _FLOAT32_BYTES


def free_bytes(device: torch.device) -> int | None:
    """Memory that could be taken on a device, or None where nobody can tell.

    Args:
        device: a CPU, whose container may have a limit of its own, or a CUDA device.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    known = [amount for amount in (_free_of_machine(), _free_of_container()) if amount is not None]
    return min(known, default=None)


def resident_bytes() -> int:
    """Memory of this process; 0 where nobody counts it."""
    return _fields(_OWN / "status").get("VmRSS:", 0) * 1024


def peak_bytes() -> int:
    """The most that it has been since `forget_peak`; 0 where nobody counts it."""
    return _fields(_OWN / "status").get("VmHWM:", 0) * 1024


def forget_peak() -> bool:
    """Let the peak be what it is now. Returns whether this kernel does so."""
    try:
        (_OWN / "clear_refs").write_text("5", encoding="ascii")  # proc(5)
    except OSError:
        return False
    return True


def _free_of_machine() -> int | None:
    kib = _fields(_MEMINFO).get("MemAvailable:")
    return None if kib is None else kib * 1024


def _free_of_container() -> int | None:
    """What the strictest limit of the control groups leaves; None without one.

    The kernel gives up pages of files before it ends a process.
    """
    free = []
    for controller, limit_name, used_name, files_name in _LIMITS:
        for group in cgroups.groups(controller):
            limit, used = cgroups.read(group / limit_name), cgroups.read(group / used_name)
            if limit.isdecimal() and used.isdecimal():  # or "max": no limit
                files = _fields(group / "memory.stat").get(files_name, 0)
                free.append(max(0, int(limit) - int(used) + files))
    return min(free, default=None)


def _fields(path: Path) -> dict[str, int]:
    """Name -> number of a file of the kernel with one such pair a line; empty where there is none."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
