"""Memory that a batch has freed stays with the process for the next one.

glibc gives large blocks back to the system as soon as they are free, and the system fills each page with zeros before
it hands it out again. The numbers between the layers of a model are such blocks: a batch of 3,300 tokens through the
shapes of BERT-base met 165,000 page faults, which cost more than two thirds of the time of everything but the matrix
products; with memory kept it meets none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_OLD_LARGEST_BYTES = 32 * 1024 * 1024
"""The highest threshold for blocks of their own that glibc takes before 2.35."""
_VARIABLE, _TUNABLES = "MALLOC_", "glibc.malloc."


def keep_memory(most_bytes: int, environment: Mapping[str, str]) -> bool:
    """Let glibc keep freed memory; call it before a second thread is started.

    Blocks come from one heap that grows as it must: those of other threads than the first have pieces of 64 MiB, which
    are given back when they are empty.

    Args:
        most_bytes: kept at the end of the heap; 0 changes nothing.
        environment: of the operator, whose own settings of the allocator win.

    Returns:
        Whether it does so. Other C libraries, and allocators put in glibc's place, have rules of their own.
    """
    theirs = any(name.startswith(_VARIABLE) for name in environment)
    if not most_bytes or theirs or _TUNABLES in environment.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_ARENA_MAX, 1)
        and mallopt(_TRIM_THRESHOLD, most_bytes)
        and (mallopt(_MMAP_THRESHOLD, most_bytes) or mallopt(_MMAP_THRESHOLD, _OLD_LARGEST_BYTES))
    )


def give_back() -> None:
    """Give freed memory back to the system, wherever it lies: after a model was loaded, of which another one is left.

    What `keep_memory` keeps for the next batch is its business only once batches run.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if malloc_trim is not None:
        malloc_trim(0)
