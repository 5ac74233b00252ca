"""Failed batches in halves: so that one bad input fails alone, and a batch too large for the memory still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from embedstream.shared import metrics
from embedstream.shared.logs import frames_of, get_logger

from .batching import MicroBatch
from .faults import BrokenDevice, Fault, fault_of
from .outcome import Embedded

log = get_logger()


@dataclass(frozen=True, slots=True)
class Failure:
    """What is kept of an exception. Not itself: its traceback holds the tensors of the batch that did not fit.

    Args:
        fault: whose it is.
        kind: its class.
        message: what it says; it may quote a text, so it is for no log line.
        frames: where it was raised.
    """

    fault: Fault
    kind: str
    message: str
    frames: tuple[str, ...]

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Take down what an exception says."""
        return cls(fault_of(error), type(error).__name__, str(error), frames_of(error))


@dataclass(frozen=True, slots=True)
class Piece:
    """A micro-batch, or a part of one, and what became of it: vectors, or the failure of its only row."""

    batch: MicroBatch
    outcome: Embedded | Failure


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
        BrokenDevice: with what the error said; no row of what is left was computed.
    """
    waiting = [batch]
    while waiting:
        some = waiting.pop()
        outcome = _attempt(some, embed)
        if isinstance(outcome, Embedded):
            yield Piece(some, outcome)
            continue
        if outcome.fault is Fault.DEVICE:
            raise BrokenDevice(outcome.message)
        if outcome.fault is Fault.MEMORY:
            too_large(some)
        if some.n_rows == 1:
            log.warning("batch.row_failed", tokens=some.n_tokens, error=outcome.kind, frames=outcome.frames)
            yield Piece(some, outcome)
            continue
        metrics.SPLIT_BATCHES.labels(outcome.fault.value).inc()
        log.warning("batch.split", rows=some.n_rows, reason=outcome.fault.value, error=outcome.kind)
        waiting += reversed(some.halves(by_cost=outcome.fault is Fault.MEMORY))


def _attempt(batch: MicroBatch, embed: Callable[[MicroBatch], Embedded]) -> Embedded | Failure:
    try:
        return embed(batch)
    except BaseException as error:  # noqa: BLE001 - whatever a model raises, its callers must hear of it
        return Failure.of(error)
