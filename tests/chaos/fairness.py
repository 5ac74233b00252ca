"""Interactive requests beside bulk work, and how long they may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from embedstream.shared.lanes import Lane

from .deployment import Deployment, Device
from .journal import Batch
from .ledger import Ledger, Outcome
from .load import ask_all

SLICE_S = 0.05
"""Default of --latency-slice-ms: what an interactive request waits at most for bulk work."""
LATE_S = 0.025
"""By so much this machine, with everything on it, may be late for one request in a hundred."""
REQUESTS = 150
"""Enough for a p99."""


async def trickle(here: Deployment, going_on: Callable[[], bool] = lambda: False) -> Ledger:
    """Requests of one input, one after the other: `REQUESTS`, and more for as long as it goes on."""
    ledger = Ledger()
    while len(ledger.lines) < REQUESTS or going_on():
        await ask_all(here.api[0].port, [here.mixture.one(1)], ledger, here.timeout_s)
        await asyncio.sleep(0.02)
    return ledger


def p99_s(ledger: Ledger) -> float:
    """Of the waits for a forward pass of all requests that got their vectors."""
    return float(np.quantile([line.queue_s for line in ledger.of(Outcome.OK)], 0.99))


def bound_s(batches: Sequence[Batch], device: Device) -> float:
    """What the p99 of interactive requests may grow by: a slice of bulk work, and the pass that they are in."""
    forward_s = max(_seconds(batch, device) for batch in batches if batch.has(Lane.INTERACTIVE))
    return SLICE_S + forward_s + LATE_S


def _seconds(batch: Batch, device: Device) -> float:
    """Of a pass, without its padding."""
    return device.base_ms / 1000 + batch.tokens / device.tokens_per_s
