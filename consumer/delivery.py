"""Delivery: what became of batches and jobs, handed to the jobs and on to the publisher."""

from __future__ import annotations

import asyncio

from embedstream.shared import metrics
from embedstream.shared.logs import get_logger
from embedstream.shared.results import Status

from .batching import MicroBatch
from .device_thread import Done
from .entries import Entry
from .faults import Fault
from .intake import Refused
from .isolation import Piece
from .outcome import Embedded, deliver, fail
from .publisher import Answer, Publisher, answer_of, answer_to_refused
from .row_queue import Dropped

ON_LOOP_ROWS = 256
"""Batches up to this size are handed out on the event loop (about 0.2 ms); a thread costs 0.1 ms."""
ON_LOOP_BYTES = 256 * 1024
AT_A_TIME = 8
"""Jobs answered between two turns of the event loop: about a millisecond."""

log = get_logger()


class Delivery:
    """Turns what the device and the intake say of jobs into answers.

    Args:
        publisher: takes the answers.
        fingerprint: of the model card, which each answer names.
    """

    def __init__(self, publisher: Publisher, fingerprint: bytes) -> None:
        self._publisher = publisher
        self._fingerprint = fingerprint

    async def settle(self, settled: Entry | Refused) -> None:
        """Answer what needs no device: a job that is refused, or each of whose rows has failed already."""
        if isinstance(settled, Entry):
            await self._publisher.put(answer_of(settled, self._fingerprint))
            return
        log.info("worker.refused", entry=settled.raw.entry_id.decode(), reason=settled.reason)
        await self._publisher.put(answer_to_refused(settled))

    async def deliver(self, done: Done) -> None:
        """Hand the vectors of a batch to its jobs, and publish the jobs it finished."""
        entries: dict[int, Entry] = {}
        for piece in done.pieces:
            if piece.batch.n_rows <= ON_LOOP_ROWS:
                _hand_out(piece, done.started_ms)
            else:
                await asyncio.to_thread(_hand_out, piece, done.started_ms)
            entries |= {id(entry): entry for entry in piece.batch.entries}
        finished = [entry for entry in entries.values() if entry.done]
        for place, entry in enumerate(finished, 1):
            await self._publisher.put(await self._answer_of(entry))
            if place % AT_A_TIME == 0:
                await asyncio.sleep(0)

    async def _answer_of(self, entry: Entry) -> Answer:
        if entry.result_bytes > ON_LOOP_BYTES:
            return await asyncio.to_thread(answer_of, entry, self._fingerprint)
        return answer_of(entry, self._fingerprint)

    async def let_go(self, dropped: list[tuple[Entry, Dropped]]) -> None:
        """End jobs nobody waits for. Of an abandoned one only its result key is told, if it has one."""
        for entry, reason in dropped:
            if reason is Dropped.EXPIRED:
                entry.fail_rest(Status.EXPIRED, f"The job waited longer than its {entry.job.ttl_ms} ms.")
            else:
                entry.cancel()
            await self._publisher.put(answer_of(entry, self._fingerprint))
        log.debug("worker.dropped", jobs=len(dropped))


def _hand_out(piece: Piece, started_ms: float) -> None:
    for entry in piece.batch.entries:
        if entry.started_ms is None:
            entry.started_ms = started_ms
            waited_s = max(0.0, started_ms - entry.raw.enqueued_ms) / 1000
            metrics.QUEUE_WAIT_SECONDS.labels(entry.raw.lane.value).observe(waited_s)
    if isinstance(piece.outcome, Embedded):
        deliver(piece.batch, piece.outcome, started_ms)
        log.debug("batch.embedded", **_size(piece.batch), duration_ms=round(piece.outcome.duration_s * 1000, 1))
        return
    memory = piece.outcome.fault is Fault.MEMORY
    reason = "There is not enough memory for it" if memory else piece.outcome.kind
    fail(piece.batch, f"The model failed on this input: {reason}.")


def _size(batch: MicroBatch) -> dict[str, int]:
    return {"jobs": len(batch.entries), "rows": batch.n_rows, "tokens": batch.n_tokens}
