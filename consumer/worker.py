"""The worker: read, batch, embed, publish; and the drain when it is told to stop.

One event loop does the I/O, one thread owns the device. Nothing waits for a timer: rows gather while the device is
busy, and it takes what there is when it is free.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import metrics
from embedstream.shared.cards import ModelCard
from embedstream.shared.connections import READER_TIMEOUT_S, after_failure, backoff_s, is_transient, pause
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.logs import get_logger, told
from embedstream.shared.runfile import is_embedded
from embedstream.shared.server_checks import check_server
from embedstream.shared.tokenization import TextTokenizer

from .budget import Budget
from .delivery import Delivery
from .device_thread import DeviceThread, Done, Trial
from .entries import Entry, RawEntry
from .hand import Hand
from .heartbeat import Heartbeat
from .intake import Intake, Refused
from .leases import Leases
from .notices import Notices
from .outcome import Embeds
from .pace import Pace
from .publisher import DeadLetterBounds, Publisher
from .reader import LaneReader
from .row_queue import Dropped, RowQueue
from .suspects import Suspects, SuspectTrial
from .watchdog import State, Watchdog

SHORT_BLOCK_MS = 20
AT_A_TIME = 8
"""Jobs looked into between two turns of the event loop: about a millisecond."""
LOOK_FOR_GIVEN_BACK_S = 30.0
"""Time between two looks through all that is pending; a consumer that gives back says so, and is looked at at once."""

log = get_logger()

News = Done | list[tuple[Entry, Dropped]] | SuspectTrial
"""What the device thread tells, in the order in which it happened."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator can set of a worker.

    Args:
        drain_timeout_s: time `run` may take to answer what is in hand once it was told to stop.
        lease_check_s: time between two looks for work nobody does.
        lease_backstop_s: time in one consumer's hands after which an entry is taken from it.
        max_consumer_deaths: consumers that may die with a job before it is a dead letter.
        latency_slice_s: longest bulk batch while interactive work is about.
        bulk_share: part of the device that bulk gets in any case.
        dead_letters: how many are kept, and for how long.
    """

    drain_timeout_s: float = 30.0
    lease_check_s: float = 0.5
    lease_backstop_s: float = 300.0
    max_consumer_deaths: int = 4
    latency_slice_s: float = 0.05
    bulk_share: float = 0.1
    dead_letters: DeadLetterBounds = DeadLetterBounds()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class Clients:
    """The connections of a worker.

    Args:
        commands: for short commands.
        lanes: of one connection, for the reads.
        notices: of one connection, for the notices.
        where: the URL of Redis as it may be shown.
    """

    commands: Redis
    lanes: Redis
    notices: Redis
    where: str = ""


class Worker:
    """Serves one model from its lanes.

    Args:
        card: of the model.
        tokenizer: made of the card, for jobs that carry text.
        embedder: runs micro-batches; loaded and warm.
        clients: of Redis.
        keys: of the model.
        consumer: name in the group.
        heartbeat: not started yet; it is what makes the consumer count as alive.
        watchdog: asked by the heartbeat.
        pace: what is known of the embedder's speed.
        budget: of a micro-batch.
        limits: what an operator has set.
    """

    def __init__(
        self,
        card: ModelCard,
        tokenizer: TextTokenizer,
        embedder: Embeds,
        clients: Clients,
        keys: Keys,
        consumer: str,
        heartbeat: Heartbeat,
        watchdog: Watchdog,
        pace: Pace,
        budget: Budget,
        limits: Limits,
    ) -> None:
        self._clients = clients
        self._consumer = consumer
        self._limits = limits
        self._budget = budget
        self._embedder = embedder
        self._pace = pace
        self._watchdog = watchdog
        self._heartbeat = heartbeat
        self._hand = Hand()
        self._reader = LaneReader(clients.lanes, keys, consumer)
        self._notices = Notices(clients.notices, keys, consumer)
        self._leases = Leases(clients.commands, keys, consumer, self._hand, int(limits.lease_backstop_s * 1000))
        self._intake = Intake(card, tokenizer, keys.reply(""))
        self._publisher = Publisher(clients.commands, keys, self._hand.give, limits.dead_letters)
        self._delivery = Delivery(self._publisher, card.fingerprint)
        self._suspects = Suspects(
            clients.commands,
            keys,
            self._leases,
            self._intake,
            heartbeat.redis_now_ms,
            self._notices.cancelled,
            limits.max_consumer_deaths,
            self._delivery.settle,
            self._hand.give,
        )
        self._tokens_of_entry = dict.fromkeys(LANES, float(budget.now))  # to know how many entries to ask for
        self._room = asyncio.Event()
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._hung = False
        self._giving_back: set[asyncio.Task[None]] = set()  # a task nobody refers to may be collected while it runs
        self._device: DeviceThread | None = None

    def stop(self) -> None:
        """Read no more; `run` returns when what has been begun is answered and the rest is given back."""
        self._stop.set()
        self._room.set()
        self._notices.released.set()

    def watchdog_says(self, state: State) -> None:
        """The watchdog has changed its mind; call it on the event loop."""
        self._hung = state is not State.MOVING
        log.warning("worker.watchdog", state=state.value, jobs=len(self._hand))
        if self._hung:
            metrics.WATCHDOG_TRIPS.inc()
            giving_back = asyncio.create_task(self._give_back(), name="give back")
            self._giving_back.add(giving_back)
            giving_back.add_done_callback(self._giving_back.discard)

    async def run(self) -> None:
        """Join the group, work until `stop`, then finish what has been begun.

        Raises:
            UnfitServer: the server would lose jobs.
            BrokenDevice: nothing more can be computed here; what was on the device stays on its lane.
        """
        if not await self._join():
            return
        log.info("worker.ready", consumer=self._consumer)
        limits = self._limits
        rows = RowQueue(self._budget, self._pace, limits.latency_slice_s, limits.bulk_share)
        device = DeviceThread(
            rows,
            self._embedder,
            self._pace,
            self._watchdog,
            self._heartbeat.redis_now_ms,
            self._notices.cancelled,
            self,
        )
        self._device = device
        device.start()
        before_the_end = [
            asyncio.create_task(self._look_after_leases(), name="leases"),
            asyncio.create_task(self._give_back_when_told(), name="drain"),
        ]
        work = asyncio.create_task(self._work(device, before_the_end), name="work")
        parts: list[asyncio.Future[Any]] = [
            work,
            *before_the_end,
            asyncio.create_task(self._publisher.run(), name="publisher"),
            asyncio.create_task(self._hear_all(device), name="news"),
            asyncio.create_task(self._turn(), name="turn"),
            (listening := asyncio.create_task(self._notices.run(self._stop), name="notices")),
        ]
        try:
            await self._until_over(work, [*parts, device.ended])
        finally:
            self.stop()
            device.abandon()
            # What reads ends by itself: to cancel a command under way would leave its connection behind.
            patience_s = min(READER_TIMEOUT_S, self._limits.drain_timeout_s / 4)
            await asyncio.wait([work, *before_the_end, listening], timeout=patience_s)
            await self._give_back()  # should we end by an error: what was not begun has nothing to do with it
            for part in parts:
                part.cancel()
            ended, _ = await asyncio.wait(parts, timeout=1)
            for part in ended:
                _ = part.cancelled() or part.exception()  # the first failure is what `run` raises
            await asyncio.to_thread(self._heartbeat.stop)
        log.info("worker.stopped", consumer=self._consumer)

    # What the device thread tells, on the event loop

    def taken(self) -> None:
        """Rows were taken: there is room for others."""
        self._room.set()

    def dropped(self, dropped: list[tuple[Entry, Dropped]]) -> None:
        """Rows were not computed, for nobody waits for them."""
        self._room.set()
        self._news.put_nowait(dropped)

    def done(self, done: Done) -> None:
        """A batch is done."""
        self._news.put_nowait(done)

    def trial_ended(self, trial: Trial) -> None:
        """A trial is over."""
        assert isinstance(trial, SuspectTrial)  # noqa: S101 - ours are the only ones
        self._news.put_nowait(trial)

    # Start and stop

    async def _until_over(self, work: asyncio.Future[Any], parts: list[asyncio.Future[Any]]) -> None:
        """Wait for the work to end. Told to stop, it has a limited time for that, however Redis behaves.

        Raises:
            BaseException: of a part that failed; without it, answers would wait for ever.
        """
        stopped: asyncio.Future[Any] = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([*parts, stopped], return_when=asyncio.FIRST_COMPLETED)
            deadline_s = asyncio.get_running_loop().time() + self._limits.drain_timeout_s
            while not work.done():
                failed = next((part for part in parts if part.done() and part.exception() is not None), None)
                if failed is not None:
                    break
                left_s = deadline_s - asyncio.get_running_loop().time()
                waiting = [part for part in parts if not part.done()]
                if left_s <= 0:
                    # What is in hand stays on its lane, under a lease that ends with our heartbeat.
                    log.error("worker.not_drained", timeout_s=self._limits.drain_timeout_s, jobs=len(self._hand))
                    return
                await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for part in parts:
                if part.done():
                    part.result()
        finally:
            stopped.cancel()

    async def _join(self) -> bool:
        """Create the lanes and begin to count as alive; try for as long as Redis is away. False when told to stop."""
        for pause_s in backoff_s():
            if self._stop.is_set():
                return False
            try:
                await self._check_server()
                await self._reader.prepare()
                await asyncio.to_thread(self._heartbeat.start)
            except (RedisError, OSError) as error:
                if not is_transient(error):
                    raise
                log.warning("worker.redis_away", redis=self._clients.where, error=told(error))
                await pause(pause_s, self._stop)
            else:
                break
        return True

    async def _check_server(self) -> None:
        """Refuse a server that would lose jobs, and say what is not as it should be.

        Raises:
            UnfitServer: restarting is no help.
        """
        where = self._clients.where
        report = await check_server(self._clients.commands, embedded=is_embedded(where))
        if report.warnings:
            log.info("worker.server", redis=where, server=report.server, warning=" ".join(report.warnings))

    async def _work(self, device: DeviceThread, before_the_end: list[asyncio.Task[None]]) -> None:
        while not self._stop.is_set():
            await self._read(device)
        await asyncio.wait(before_the_end)
        await self._give_back()  # what the last reads have brought
        device.finish()
        await asyncio.wait([device.ended])
        await self._news.join()  # also when the device is lost: what it computed before is answered
        await self._publisher.flush()
        device.ended.result()

    async def _give_back_when_told(self) -> None:
        """Give back at once: the last blocking read may still take a second."""
        await self._stop.wait()
        await self._give_back()

    async def _give_back(self) -> None:
        """Let others have everything of which no row has gone to the device."""
        if self._device is None:
            return
        entries, trials = self._device.release()
        raws = [entry.raw for entry in entries] + self._suspects.release()
        for trial in trials:
            assert isinstance(trial, SuspectTrial)  # noqa: S101 - ours are the only ones
            self._suspects.ended(trial)
        raws += self._suspects.release()
        if raws:
            await self._leases.give_back(raws)
            self._hand.give(raws)

    async def _turn(self) -> None:
        """Show the watchdog that the event loop turns."""
        while True:
            self._watchdog.turn()
            await asyncio.sleep(min(0.5, self._watchdog.limit_s / 4))

    # Reading

    async def _read(self, device: DeviceThread) -> None:
        """Bring in what fills the next batch; with enough in hand, wait until the device has taken some."""
        if self._hung:
            await pause(SHORT_BLOCK_MS / 1000, self._stop)
            return
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
        await self._take_in(entries)

    def _wanted(self, device: DeviceThread) -> dict[Lane, int]:
        """How many entries of each lane would fill what should wait. Bulk fills what interactive leaves.

        One bulk entry is always in hand, so that bulk can have its share while interactive work keeps coming.
        """
        most = device.wants
        interactive, bulk = device.tokens(Lane.INTERACTIVE), device.tokens(Lane.BULK)
        counts = {
            Lane.INTERACTIVE: self._entries_of(Lane.INTERACTIVE, most - interactive),
            Lane.BULK: max(self._entries_of(Lane.BULK, most - interactive - bulk), 0 if bulk else 1),
        }
        return {lane: count for lane, count in counts.items() if count > 0}

    def _entries_of(self, lane: Lane, tokens: int) -> int:
        """How many of a lane's entries hold so many tokens, going by those read lately."""
        return -int(-tokens // max(1.0, self._tokens_of_entry[lane]))

    def _observe(self, lane: Lane, tokens: int) -> None:
        """Large entries count at once, smaller ones little by little: taking too many is worse than asking again."""
        known = self._tokens_of_entry[lane]
        self._tokens_of_entry[lane] = float(tokens) if tokens > known else known + 0.1 * (tokens - known)

    async def _look_after_leases(self) -> None:
        """Look for work that nobody does: at once, then again and again, and whenever somebody gives some back."""
        walked_s = float("-inf")
        while not self._stop.is_set():
            told_to = self._notices.released.is_set()
            self._notices.released.clear()
            room, found, now_s = self._suspects.room, [], asyncio.get_running_loop().time()
            walk = told_to or now_s - walked_s > LOOK_FOR_GIVEN_BACK_S
            try:
                if not self._hung:
                    await self._take_in(await self._leases.astray())
                # Heartbeats that Redis could not take have expired: whoever took over at once would steal live work.
                if not self._hung and self._heartbeat.is_steady():
                    found = await self._leases.abandoned(room, given_back=walk)
                    walked_s = now_s if walk else walked_s
            except (RedisError, OSError) as error:
                log.warning("leases.failed", error=told(error))
                await after_failure(self._clients.commands, error)
            await self._take_in(found)
            if found:
                self._notices.released.set()  # there may be more: look again at once
            elif room:
                await pause(self._limits.lease_check_s * random.uniform(0.75, 1.25), self._notices.released)  # noqa: S311
            else:
                await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        """Wait until the trials have made room for more suspects."""
        while not self._suspects.room and not self._stop.is_set():
            await pause(SHORT_BLOCK_MS / 1000, self._stop)

    async def _take_in(self, raw_entries: Sequence[RawEntry]) -> None:
        """Take up entries as they were read, and let the device have what is to be computed."""
        fresh = self._hand.take(raw_entries)  # before anything can fail: what is not in hand counts as astray
        if fresh and (self._stop.is_set() or self._hung):  # a read may have been under way when that came
            await self._leases.give_back(fresh)
            self._hand.give(fresh)
            return
        self._suspects.add([raw for raw in fresh if raw.deaths])
        innocent = [raw for raw in fresh if not raw.deaths]
        for start in range(0, len(innocent), AT_A_TIME):
            if start:
                await asyncio.sleep(0)
            await self._take_in_some(innocent[start : start + AT_A_TIME])
        self._offer_trial()

    async def _take_in_some(self, raws: Sequence[RawEntry]) -> None:
        accepted: dict[Lane, list[Entry]] = {}
        for raw in raws:
            taken = await self._intake.accept(raw, self._heartbeat.redis_now_ms())
            if isinstance(taken, Refused) or taken.done:
                await self._delivery.settle(taken)
            else:
                self._observe(raw.lane, len(taken.tokens.ids))
                accepted.setdefault(raw.lane, []).append(taken)
        # No turn of the loop between looking a request up and handing it over: else a notice could slip through.
        for lane, entries in accepted.items():
            wanted: list[Entry] = []
            called_off: list[tuple[Entry, Dropped]] = []
            for entry in entries:
                if entry.is_called_off(self._notices.cancelled):
                    called_off.append((entry, Dropped.CANCELLED))
                else:
                    wanted.append(entry)
            if wanted and self._device is not None:
                self._device.add(lane, wanted)
            if called_off:
                self._news.put_nowait(called_off)

    def _offer_trial(self) -> None:
        if self._device is not None and not self._hung and not self._stop.is_set():
            trial = self._suspects.next_trial()
            if trial is not None:
                self._device.try_apart(trial)

    # Answering

    async def _hear_all(self, device: DeviceThread) -> None:
        """Take the device thread's news, one after the other."""
        while True:
            news = await self._news.get()
            if isinstance(news, Done):
                await self._delivery.deliver(news)
                device.delivered()
            elif isinstance(news, SuspectTrial):
                self._suspects.ended(news)
                if not news.begun:
                    await pause(SHORT_BLOCK_MS / 1000, self._stop)  # Redis is away
                self._offer_trial()
            else:
                await self._delivery.let_go(news)
            self._news.task_done()
