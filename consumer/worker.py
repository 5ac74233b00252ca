"""The worker: read, batch, embed, publish; and the drain when it is told to stop.

One event loop does the I/O, one thread owns the device. A batch runs while the next one waits ready; nothing waits for
a timer, because batches grow by themselves while the device is busy.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import backoff_s, is_transient
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.logs import get_logger

from .batching import MicroBatch, RowQueue
from .embedder import Embedded, Embedder, deliver, fail
from .entries import Entry, RawEntry
from .heartbeat import Heartbeat
from .intake import Intake, Refused
from .model import Model
from .publisher import Publisher, answer_of, answer_to_refused
from .reader import LaneReader

BATCHES_IN_HAND = 2
"""One on the device, one ready to follow it. More would starve other consumers of work."""

log = get_logger()


class Worker:
    """Serves one model from its lanes.

    Args:
        model: loaded and warm.
        redis: client for short commands.
        reader: client of one connection for the reads.
        keys: of the model.
        consumer: name in the group.
        heartbeat: not started yet; it is what makes the consumer count as alive.
        budget: most tokens of a micro-batch, padding included.
    """

    def __init__(
        self,
        model: Model,
        redis: Redis,
        reader: Redis,
        keys: Keys,
        consumer: str,
        heartbeat: Heartbeat,
        budget: int,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._consumer = consumer
        self._fingerprint = model.card.fingerprint
        self._embedder = Embedder(model)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._reader = LaneReader(reader, keys, consumer)
        self._intake = Intake(model.card, model.tokenizer, keys.reply(""))
        self._publisher = Publisher(redis, keys)
        self._heartbeat = heartbeat
        self._rows = RowQueue(budget)
        self._tokens_of_entry = float(budget)  # running mean, to know how many entries to ask for
        self._hand = asyncio.Semaphore(BATCHES_IN_HAND)
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = False

    def stop(self) -> None:
        """Read no more; `run` returns when what is in hand is answered."""
        self._stopping = True

    async def run(self) -> None:
        """Join the group, work until `stop`, then finish what is in hand."""
        await self._join()
        publishing = asyncio.create_task(self._publisher.run(), name="publisher")
        log.info("worker.ready", consumer=self._consumer)
        try:
            while not self._stopping:
                # First a place for a batch, then the reads: what came while the device was busy goes along.
                await self._hand.acquire()
                await self._read()
                self._submit()
            while len(self._rows):
                await self._hand.acquire()
                self._submit()
            await asyncio.gather(*self._running)
            await self._publisher.flush()
            await asyncio.to_thread(self._heartbeat.stop)
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            self._device.shutdown(cancel_futures=True)
        log.info("worker.stopped", consumer=self._consumer)

    async def _join(self) -> None:
        """Create the lanes and begin to count as alive; try for as long as Redis is away."""
        for pause_s in backoff_s():
            try:
                await self._reader.prepare()
                await asyncio.to_thread(self._heartbeat.start)
            except (RedisError, OSError) as error:
                if self._stopping or not is_transient(error):
                    raise
                log.warning("worker.redis_away", error=repr(error))
                await asyncio.sleep(pause_s)
            else:
                return

    async def _read(self) -> None:
        """Bring in what fills a batch; wait for entries only when there is nothing to do."""
        if not len(self._rows):
            await self._take_in(await self._reader.wait())
        while not self._stopping and (counts := self._wanted()):
            entries = await self._reader.take(counts)
            await self._take_in(entries)
            if len(entries) < min(self._reader.most, min(counts.values())):
                break  # the lanes are empty, or nearly

    def _wanted(self) -> dict[Lane, int]:
        """How many entries of each lane would fill the batch. Bulk fills what interactive leaves.

        One bulk entry is always in hand, so that bulk can have its share while interactive work keeps coming.
        """
        budget, each = self._rows.budget, max(1.0, self._tokens_of_entry)
        interactive, bulk = self._rows.tokens(Lane.INTERACTIVE), self._rows.tokens(Lane.BULK)
        counts = {
            Lane.INTERACTIVE: -int(-(budget - interactive) // each),
            Lane.BULK: max(-int(-(budget - interactive - bulk) // each), 0 if bulk else 1),
        }
        return {lane: count for lane, count in counts.items() if count > 0}

    async def _take_in(self, raw_entries: list[RawEntry]) -> None:
        accepted: dict[Lane, list[Entry]] = {}
        now_ms = self._heartbeat.redis_now_ms()
        for raw in raw_entries:
            taken = await self._intake.accept(raw, now_ms)
            if isinstance(taken, Refused):
                log.info("worker.refused", entry=raw.entry_id.decode(), reason=taken.reason)
                await self._publisher.put(answer_to_refused(taken))
            elif taken.done:  # each of its rows has failed already
                await self._publisher.put(answer_of(taken, self._fingerprint))
            else:
                self._tokens_of_entry += 0.1 * (len(taken.tokens.ids) - self._tokens_of_entry)
                accepted.setdefault(raw.lane, []).append(taken)
        for lane, entries in accepted.items():
            self._rows.add(lane, entries)

    def _submit(self) -> None:
        """Hand the next micro-batch to the device, in the place that was acquired for it."""
        batch = self._rows.take()
        if batch is None:
            self._hand.release()
            return
        task = asyncio.create_task(self._embed(batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _embed(self, batch: MicroBatch) -> None:
        loop = asyncio.get_running_loop()
        try:
            started_ms, embedded = await loop.run_in_executor(self._device, self._on_device, batch)
        except Exception as error:  # whatever the model raises, its callers must hear of it
            log.exception("batch.failed", jobs=len(batch.entries), rows=batch.n_rows, tokens=batch.n_tokens)
            fail(batch, f"The model failed on this batch: {type(error).__name__}.")
        else:
            deliver(batch, embedded, started_ms)
            log.debug(
                "batch.embedded",
                jobs=len(batch.entries),
                rows=batch.n_rows,
                tokens=batch.n_tokens,
                duration_ms=round(embedded.duration_s * 1000, 1),
            )
        finally:
            self._hand.release()
        for entry in batch.entries:
            if entry.done:
                await self._publisher.put(answer_of(entry, self._fingerprint))

    def _on_device(self, batch: MicroBatch) -> tuple[float, Embedded]:
        started_ms = self._heartbeat.redis_now_ms()
        return started_ms, self._embedder.embed(batch)
