"""The control groups of this process: what a container or a service may use of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def groups(controller: str = "") -> Iterator[Path]:
    """The process's group and those around it. In a container its own is mostly mounted as the root.

    Args:
        controller: of version 1, where each has a hierarchy of its own; "" for version 2.
    """
    yield _ROOT / controller
    for line in read(_OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = Path(path.lstrip("/"))
            yield from (_ROOT / controller / group for group in (own, *own.parents) if group != Path())


def read(path: Path) -> str:
    """The content of one of the system's files; empty where this machine has none of that name."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
