"""The worker: read, batch, embed, publish; and the drain when it is told to stop.

One event loop does the I/O, one thread owns the device. Nothing waits for a timer: rows gather while the device is
busy, and it takes what there is when it is free.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.cards import ModelCard
from embedstream.shared.connections import backoff_s, is_transient, pause
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.logs import get_logger
from embedstream.shared.tokenization import TextTokenizer

from .batching import MicroBatch, RowQueue
from .device_thread import DeviceThread, Outcome
from .entries import Entry, RawEntry
from .heartbeat import Heartbeat
from .intake import Intake, Refused
from .outcome import Embeds, deliver, fail
from .publisher import Publisher, answer_of, answer_to_refused
from .reader import LaneReader

ON_LOOP_ROWS = 256
"""Batches up to this size are handed out on the event loop (about 0.2 ms); a thread costs 0.1 ms."""
ON_LOOP_BYTES = 256 * 1024

SHORT_BLOCK_MS = 20

log = get_logger()


class Worker:
    """Serves one model from its lanes.

    Args:
        card: of the model.
        tokenizer: made of the card, for jobs that carry text.
        embedder: runs micro-batches; loaded and warm.
        redis: client for short commands.
        reader: client of one connection for the reads.
        keys: of the model.
        consumer: name in the group.
        heartbeat: not started yet; it is what makes the consumer count as alive.
        budget: most tokens of a micro-batch, padding included.
        drain_timeout_s: time `run` may take to answer what is in hand once it was told to stop.
        where: the URL of Redis as it may be shown, for log lines.
    """

    def __init__(
        self,
        card: ModelCard,
        tokenizer: TextTokenizer,
        embedder: Embeds,
        redis: Redis,
        reader: Redis,
        keys: Keys,
        consumer: str,
        heartbeat: Heartbeat,
        budget: int,
        drain_timeout_s: float = 30.0,
        where: str = "",
    ) -> None:
        self._where = where
        self._consumer = consumer
        self._fingerprint = card.fingerprint
        self._budget = budget
        self._drain_timeout_s = drain_timeout_s
        self._embedder = embedder
        self._reader = LaneReader(reader, keys, consumer)
        self._intake = Intake(card, tokenizer, keys.reply(""))
        self._publisher = Publisher(redis, keys)
        self._heartbeat = heartbeat
        self._tokens_of_entry = dict.fromkeys(LANES, float(budget))  # to know how many entries to ask for
        self._room = asyncio.Event()
        self._done: asyncio.Queue[tuple[MicroBatch, Outcome]] = asyncio.Queue()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Read no more; `run` returns when what is in hand is answered."""
        self._stop.set()
        self._room.set()

    async def run(self) -> None:
        """Join the group, work until `stop`, then finish what is in hand."""
        if not await self._join():
            return
        log.info("worker.ready", consumer=self._consumer)
        device = DeviceThread(
            RowQueue(self._budget),
            lambda batch: self._embedder.embed(batch),
            self._heartbeat.redis_now_ms,
            self._room.set,
            lambda batch, outcome: self._done.put_nowait((batch, outcome)),
        )
        device.start()
        parts: list[asyncio.Future[Any]] = [
            asyncio.create_task(self._work(device), name="work"),
            asyncio.create_task(self._publisher.run(), name="publisher"),
            asyncio.create_task(self._deliver_all(device), name="delivery"),
        ]
        try:
            await self._until_over(parts[0], [*parts, device.ended])
        finally:
            device.abandon()
            for part in parts:
                part.cancel()
            await asyncio.wait(parts, timeout=1)
            await asyncio.to_thread(self._heartbeat.stop)
        log.info("worker.stopped", consumer=self._consumer)

    async def _until_over(self, work: asyncio.Future[Any], parts: list[asyncio.Future[Any]]) -> None:
        """Wait for the work to end. Told to stop, it has a limited time for that, however Redis behaves.

        Raises:
            BaseException: of a part that failed; without it, answers would wait for ever.
        """
        told: asyncio.Future[Any] = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([*parts, told], return_when=asyncio.FIRST_COMPLETED)
            deadline_s = asyncio.get_running_loop().time() + self._drain_timeout_s
            while not work.done():
                failed = next((part for part in parts if part.done() and part.exception() is not None), None)
                if failed is not None:
                    break
                left_s = deadline_s - asyncio.get_running_loop().time()
                waiting = [part for part in parts if not part.done()]
                if left_s <= 0:
                    # What is in hand stays on its lane, under a lease that ends with our heartbeat.
                    log.error("worker.not_drained", timeout_s=self._drain_timeout_s)
                    return
                await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for part in parts:
                if part.done():
                    part.result()
        finally:
            told.cancel()

    async def _join(self) -> bool:
        """Create the lanes and begin to count as alive; try for as long as Redis is away. False when told to stop."""
        for pause_s in backoff_s():
            if self._stop.is_set():
                return False
            try:
                await self._reader.prepare()
                await asyncio.to_thread(self._heartbeat.start)
            except (RedisError, OSError) as error:
                if not is_transient(error):
                    raise
                log.warning("worker.redis_away", redis=self._where, error=repr(error))
                await asyncio.sleep(pause_s)
            else:
                break
        return True

    async def _work(self, device: DeviceThread) -> None:
        while not self._stop.is_set():
            await self._read(device)
        device.finish()
        await asyncio.shield(device.ended)
        await self._done.join()
        await self._publisher.flush()

    async def _read(self, device: DeviceThread) -> None:
        """Bring in what fills the next batch; with enough in hand, wait until the device has taken some."""
        self._room.clear()
        counts = self._wanted(device)
        entries = await self._reader.take(counts)
        if not entries and len(counts) == len(LANES):
            entries = await self._reader.wait(counts, min(counts.values()))
        elif not entries and Lane.INTERACTIVE in counts:
            # There is bulk in hand. Not long: the device may want more of it soon.
            entries = await self._reader.wait([Lane.INTERACTIVE], counts[Lane.INTERACTIVE], SHORT_BLOCK_MS)
        elif not entries:
            await pause(SHORT_BLOCK_MS / 1000, self._room)
        await self._take_in(entries, device)

    def _wanted(self, device: DeviceThread) -> dict[Lane, int]:
        """How many entries of each lane would fill a batch. Bulk fills what interactive leaves.

        One bulk entry is always in hand, so that bulk can have its share while interactive work keeps coming.
        """
        interactive, bulk = device.tokens(Lane.INTERACTIVE), device.tokens(Lane.BULK)
        counts = {
            Lane.INTERACTIVE: self._entries_of(Lane.INTERACTIVE, self._budget - interactive),
            Lane.BULK: max(self._entries_of(Lane.BULK, self._budget - interactive - bulk), 0 if bulk else 1),
        }
        return {lane: count for lane, count in counts.items() if count > 0}

    def _entries_of(self, lane: Lane, tokens: int) -> int:
        """How many of a lane's entries hold so many tokens, going by those read lately."""
        return -int(-tokens // max(1.0, self._tokens_of_entry[lane]))

    def _observe(self, lane: Lane, tokens: int) -> None:
        """Large entries count at once, smaller ones little by little: taking too many is worse than asking again."""
        known = self._tokens_of_entry[lane]
        self._tokens_of_entry[lane] = float(tokens) if tokens > known else known + 0.1 * (tokens - known)

    async def _take_in(self, raw_entries: list[RawEntry], device: DeviceThread) -> None:
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
                self._observe(raw.lane, len(taken.tokens.ids))
                accepted.setdefault(raw.lane, []).append(taken)
        for lane, entries in accepted.items():
            device.add(lane, entries)

    async def _deliver_all(self, device: DeviceThread) -> None:
        """Hand the vectors of each batch to its jobs, one batch after the other, and publish the jobs it finished."""
        while True:
            batch, outcome = await self._done.get()
            if batch.n_rows <= ON_LOOP_ROWS:
                self._deliver(batch, outcome)
            else:
                await asyncio.to_thread(self._deliver, batch, outcome)
            for entry in batch.entries:
                if entry.done:
                    large = entry.result_bytes > ON_LOOP_BYTES
                    answer = (
                        await asyncio.to_thread(answer_of, entry, self._fingerprint)
                        if large
                        else answer_of(entry, self._fingerprint)
                    )
                    await self._publisher.put(answer)
            device.delivered()
            self._done.task_done()

    @staticmethod
    def _deliver(batch: MicroBatch, outcome: Outcome) -> None:
        started_ms, embedded = outcome
        size = {"jobs": len(batch.entries), "rows": batch.n_rows, "tokens": batch.n_tokens}
        if isinstance(embedded, BaseException):
            log.error("batch.failed", **size, exc_info=embedded)
            fail(batch, f"The model failed on this batch: {type(embedded).__name__}.")
            return
        deliver(batch, embedded, started_ms)
        log.debug("batch.embedded", **size, duration_ms=round(embedded.duration_s * 1000, 1))
