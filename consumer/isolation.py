"""Failed batches in halves: so that one bad input fails alone, and a batch too large for the memory still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from embedstream.shared import metrics
from embedstream.shared.logs import get_logger

from .batching import MicroBatch
from .faults import BrokenDevice, Fault, fault_of
from .outcome import Embedded

log = get_logger()


@dataclass(frozen=True, slots=True)
class Piece:
    """A micro-batch, or a part of one, and what became of it: vectors, or the error of its only row."""

    batch: MicroBatch
    outcome: Embedded | BaseException


def run(
    batch: MicroBatch, embed: Callable[[MicroBatch], Embedded], too_large: Callable[[MicroBatch], None]
) -> Iterator[Piece]:
    """Run a batch; where it fails, its halves, down to single rows.

    With one bad row among n this takes about log2(n) further passes over ever smaller parts: neighbours succeed in the
    half that does not hold it.

    Args:
        batch: at least one row.
        embed: raises when it fails.
        too_large: told of each batch for which there was not enough memory.

    Yields:
        Pieces that together hold each row once.

    Raises:
        BrokenDevice: from the error that said so; no row of what is left was computed.
    """
    waiting = [batch]
    while waiting:
        some = waiting.pop()
        outcome = _attempt(some, embed)
        if isinstance(outcome, Embedded):
            yield Piece(some, outcome)
            continue
        fault = fault_of(outcome)
        if fault is Fault.DEVICE:
            raise BrokenDevice(str(outcome)) from outcome
        if fault is Fault.MEMORY:
            too_large(some)
        if some.n_rows == 1:
            log.warning("batch.row_failed", tokens=some.n_tokens, exc_info=outcome)
            yield Piece(some, outcome)
            continue
        metrics.SPLIT_BATCHES.labels(fault.value).inc()
        log.warning("batch.split", rows=some.n_rows, reason=fault.value, error=type(outcome).__name__)
        waiting += reversed(some.halves())


def _attempt(batch: MicroBatch, embed: Callable[[MicroBatch], Embedded]) -> Embedded | BaseException:
    try:
        return embed(batch)
    except BaseException as error:  # noqa: BLE001 - whatever a model raises, its callers must hear of it
        return error
