"""How much of the machine this process may use: all of it, or what its container allows."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def memory_limit_bytes() -> int:
    """The smaller of the machine's memory and the container's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups version 2 and 1
        text = _read(name)
        if text.isdecimal():  # or "max"
            limits.append(int(text))
    return min(limits)


def available_cores() -> int:
    """The cores this process may use, at least one; more threads than that are only throttled."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    if not quota:  # cgroups version 1
        quota, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal():  # or "max", or -1
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _read(name: str) -> str:
    """The content of a control file; empty where this machine has none of that name."""
    try:
        return (_CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""
