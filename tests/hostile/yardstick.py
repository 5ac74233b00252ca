"""How fast this machine is: limits of time mean nothing without the processor."""

from __future__ import annotations

import json
import time

_TEXT = json.dumps([list(range(200))] * 20)
_MS = 0.43
"""What `slowness` measures takes so long on the machine where the limits were held."""


def slowness() -> float:
    """How many times slower this machine is just now, in processor time; at least 1."""
    best_ns = 2**63
    for _ in range(10):
        start_ns = time.thread_time_ns()
        json.loads(_TEXT)
        sum(range(20_000))
        best_ns = min(best_ns, time.thread_time_ns() - start_ns)
    return max(1.0, best_ns / 1e6 / _MS)
