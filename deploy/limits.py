"""How much of the machine this process may use: all of it, or what its container allows."""

from __future__ import annotations

import os
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


def _read(name: str) -> str:
    """The content of a control file; empty where this machine has none of that name."""
    try:
        return (_CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""
