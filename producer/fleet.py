"""The fleet as a caller sees it: which consumers are alive, which model they serve, its card, and its lanes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import load_failures, metrics
from embedstream.shared.cards import Announcement, CardCache, ModelCard, ModelEntry
from embedstream.shared.connections import after_failure, pause
from embedstream.shared.errors import MalformedMessage, Unavailable, UnfitServer
from embedstream.shared.keys import Keys, models
from embedstream.shared.lanes import LANES
from embedstream.shared.logs import get_logger
from embedstream.shared.runfile import is_embedded
from embedstream.shared.server_checks import check_server
from embedstream.shared.tokenization import TextTokenizer

from .admission import TOTALS_FIELDS, Admission
from .contact import Contact

POLL_S = 0.5
SAMPLE_S = 0.2
"""Between two looks at the lanes."""
_STALE_S = 2.0
_PATIENCE_S = 2.2
"""A caller waits no longer than this for an answer of Redis, however many timeouts it takes."""
_MOST_REMEMBERED = 100

log = get_logger()

Said = TypeVar("Said", ModelEntry, Announcement)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that consumers have announced: its keys, its newest card and the tokenizer made of it."""

    keys: Keys
    names: tuple[str, ...]
    card: ModelCard
    tokenizer: TextTokenizer


@dataclass(frozen=True, slots=True)
class _Lanes:
    """The lanes of one model, and who wants to know when the server has lost them."""

    admission: Admission
    watchers: list[asyncio.Event] = field(default_factory=list)


class Fleet:
    """Follows the fleet by polling; questions are answered from memory, so a probe never waits for Redis.

    Args:
        redis: client for short commands.
        prefix: beginning of all keys.
        model: a served name; None for the only model there is.
        cache: where cards are kept on disk.
        where: the URL of Redis as it may be shown, for log lines.
        scale_from_zero_s: whether requests are taken while no consumer is alive, for so long; 0: they are not.
        max_wait_s: longest predicted wait that is accepted.
        max_lane_bytes: most bytes of jobs on one lane; 0 derives it from the server's memory.
        bulk_share: part of the fleet's tokens that bulk work gets however much interactive work waits.
    """

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        model: str | None,
        cache: CardCache,
        where: str,
        *,
        scale_from_zero_s: float = 0.0,
        max_wait_s: float = 10.0,
        max_lane_bytes: int = 0,
        bulk_share: float = 0.1,
    ) -> None:
        self._redis = redis
        self._takes_without_consumers = scale_from_zero_s > 0
        self._max_wait_s = max_wait_s
        self._max_lane_bytes = max_lane_bytes
        self._bulk_share = bulk_share
        self._maxmemory_bytes = 0
        self._server_checked = False
        self._warned: set[str] = set()
        self._lanes: dict[Keys, _Lanes] = {}  # more than one only after the model on the queue was replaced
        self._where = where
        self._fleet_contact = Contact(where, "What consumers announce")
        self._lanes_contact = Contact(where, "What is on the lanes")
        self._prefix = prefix
        self._model = model
        self._cache = cache
        self._checked_s = float("-inf")
        self._trouble: str | None = "Redis has not been asked yet."
        self._unreadable: set[bytes] = set()  # values already complained about
        self._refreshing: asyncio.Task[None] | None = None
        self._no_consumers = False  # and that is all that is missing
        self.unannounced = False
        """Whether no consumer has ever announced the model asked for, or any model where none was asked for."""
        self.load_failure: str | None = None
        """Why the last consumer could not serve the model, while none serves it. It names files of that machine: it is
        for operators, and no part of the errors that callers get."""
        self.redis_ok = False
        self.served: ServedModel | None = None
        self.consumers: tuple[Announcement, ...] = ()

    @property
    def trouble(self) -> str | None:
        """Why a request would not be answered now, or None."""
        # Without looks at the lanes, requests would be admitted by what was there long ago.
        return self._fleet_contact.trouble or self._lanes_contact.trouble or self._trouble

    def admission(self, keys: Keys, lost_contact: asyncio.Event | None = None) -> Admission:
        """What requests of a model are admitted by; kept fresh from now on.

        Args:
            keys: of the model.
            lost_contact: set whenever the server is seen to have lost what it held.
        """
        lanes = self._lanes.get(keys)
        if lanes is None:
            admission = Admission(self._max_wait_s, self._max_lane_bytes, self._bulk_share)
            lanes = self._lanes[keys] = _Lanes(admission)
            lanes.admission.maxmemory_bytes = self._maxmemory_bytes
        if lost_contact is not None:
            lanes.watchers.append(lost_contact)
        return lanes.admission

    async def run(self, stopping: asyncio.Event) -> None:
        """Poll until `stopping` is set."""
        loop = asyncio.get_running_loop()
        while not stopping.is_set():
            if loop.time() - self._checked_s >= POLL_S:
                await self.refresh()
            if self._fleet_contact.ok:
                await self._guarded(self._sample(), self._lanes_contact)
            await pause(SAMPLE_S, stopping)

    async def refresh(self) -> None:
        """Ask Redis now; a failure is remembered as the trouble. All who ask at one time share one question."""
        if self._refreshing is None or self._refreshing.done():
            # With no context: what it logs is not about the request that happened to be the first.
            self._refreshing = asyncio.create_task(self._ask(), context=Context())
        await asyncio.shield(self._refreshing)  # a caller who gives up must not stop it for the others

    async def _ask(self) -> None:
        await self._guarded(self._refresh(), self._fleet_contact)
        if self._fleet_contact.ok and self._lanes_contact.trouble is not None:  # it may be over too
            await self._guarded(self._sample(), self._lanes_contact)
        self._checked_s = asyncio.get_running_loop().time()

    async def _guarded(self, asking: Coroutine[Any, Any, None], contact: Contact) -> None:
        """Ask something of Redis; whatever goes wrong becomes the trouble, and must not end the polling."""
        try:
            await asking
            contact.heard()
        except Exception as error:  # noqa: BLE001 - the contact logs what is not Redis's
            contact.failed(error)
            if isinstance(error, (RedisError, OSError, UnfitServer)):
                self._server_checked = False  # another server may answer next time
                await after_failure(self._redis, error)
        self.redis_ok = self._fleet_contact.ok and self._lanes_contact.trouble is None

    async def refresh_within(self, seconds: float) -> bool:
        """Ask Redis now, but wait no longer than `seconds`, and never longer than 2.2 s. Returns whether it is done."""
        asking = asyncio.ensure_future(self.refresh())
        done, _ = await asyncio.wait({asking}, timeout=max(0.0, min(_PATIENCE_S, seconds)))
        return bool(done)  # if not, it goes on; only this caller waits no longer

    async def live(self, within_s: float = math.inf) -> ServedModel:
        """The model, when somebody serves it now, or when requests may wait for the first consumer.

        Args:
            within_s: how long the caller has time.

        Raises:
            Unavailable: no Redis, no such model, or no consumer; within 2.2 s, whatever Redis does.
        """
        age_s = asyncio.get_running_loop().time() - self._checked_s
        asks = self.trouble is not None or age_s > _STALE_S  # good news is worth a question
        if asks and not await self.refresh_within(within_s):
            raise Unavailable("Redis does not answer.", retry_after_s=2.0)
        if self.served is not None and (self.trouble is None or self._only_consumers_lack):
            return self.served
        raise Unavailable(self.trouble or "No consumer is alive.", retry_after_s=2.0)

    @property
    def _only_consumers_lack(self) -> bool:
        """Whether requests may be queued although nobody is there to serve them yet."""
        return self._takes_without_consumers and self.redis_ok and self._no_consumers

    async def _refresh(self) -> None:
        if not self._server_checked:
            await self._check_server()
        self._no_consumers = False
        table: Any = await self._redis.hgetall(models(self._prefix))
        entries = {name.decode(): entry for name, value in table.items() if (entry := self._read(ModelEntry, value))}
        if self._model is None and len({entry.model for entry in entries.values()}) > 1:
            entries = await self._living(entries)  # the table remembers models that nobody serves any more
        entry = self._choose(entries)
        self.unannounced = entry is None and (self._model is not None or not entries)
        if entry is None:
            self._take_consumers(())
            self._trouble = self._why_none(entries)
            # Where several models are served and none is named, no failure is what keeps requests from being answered.
            failed = await load_failures.told(self._redis, self._prefix, self._model) if self.unannounced else None
            self.load_failure = failed
            return
        keys = Keys(self._prefix, entry.model)
        members: Any = await self._redis.zrange(keys.live, 0, -1)
        beats: Any = await self._redis.mget([keys.heartbeat(name.decode()) for name in members]) if members else ()
        self._take_consumers(tuple(said for beat in beats if beat and (said := self._read(Announcement, beat))))
        failed = None if self.consumers else await load_failures.told(self._redis, self._prefix, entry.model)
        self.load_failure = failed
        self.admission(keys).tokens_per_s = sum(said.tokens_per_s for said in self.consumers)
        if self.consumers:
            # Not what the table says: its last writer may have gone again, and left an older revision alone.
            entry = max(self.consumers, key=lambda said: (said.started_s, said.consumer)).card
        names = (entry.model, *(name for name, other in entries.items() if other.model == entry.model != name))
        if not await self._follow(keys, names, entry):
            self._trouble = f"The card of `{entry.model}` is not in Redis yet."
            return
        self._no_consumers = not self.consumers
        self._trouble = None if self.consumers else f"No consumer of `{entry.model}` is alive."

    def _take_consumers(self, consumers: tuple[Announcement, ...]) -> None:
        self.consumers = consumers
        metrics.LIVE_CONSUMERS.set(len(consumers))

    async def _check_server(self) -> None:
        report = await check_server(self._redis, embedded=is_embedded(self._where))
        self._server_checked = True
        self._maxmemory_bytes = report.maxmemory_bytes
        for lanes in self._lanes.values():
            lanes.admission.maxmemory_bytes = report.maxmemory_bytes
        if news := [warning for warning in report.warnings if warning not in self._warned]:
            # Not a warning, so that only processes of ours tell it: users of the library can rarely mend the server.
            log.info("fleet.server", redis=self._where, server=report.server, warning=" ".join(news))
        self._warned.update(news)

    async def _sample(self) -> None:
        """Look at the lanes; length and totals are read at one moment, for they are compared."""
        for keys, lanes in list(self._lanes.items()):
            async with self._redis.pipeline(transaction=True) as pipe:
                for lane in LANES:
                    pipe.xlen(keys.lane(lane))
                pipe.hmget(keys.totals, TOTALS_FIELDS)
                pipe.xlen(keys.dead_letters)
                *waiting, sums, dead_letters = await pipe.execute()
            metrics.DEAD_LETTERS_KEPT.set(dead_letters)
            if lanes.admission.observe(waiting, sums):
                log.warning("fleet.totals_lost", model=keys.model)
                for lost_contact in lanes.watchers:
                    lost_contact.set()

    async def _living(self, entries: dict[str, ModelEntry]) -> dict[str, ModelEntry]:
        """The entries of models with a live consumer; all of them when none has one."""
        seconds, micros = await self._redis.time()
        now_ms = seconds * 1000 + micros // 1000
        living = set()
        for model in {entry.model for entry in entries.values()}:
            if await self._redis.zcount(Keys(self._prefix, model).live, now_ms, "+inf"):
                living.add(model)
        return {name: entry for name, entry in entries.items() if entry.model in living} or entries

    def _read(self, kind: type[Said], data: bytes) -> Said | None:
        """What somebody wrote, or None: one unreadable value must not hide the others."""
        try:
            return kind.decode(data)
        except MalformedMessage as error:
            if data not in self._unreadable:
                if len(self._unreadable) == _MOST_REMEMBERED:
                    self._unreadable.clear()
                self._unreadable.add(data)
                log.warning("fleet.unreadable", error=str(error))
            return None

    async def _follow(self, keys: Keys, names: tuple[str, ...], entry: ModelEntry) -> bool:
        """Take up the card that is current; whether it could be had."""
        served = self.served
        if served is None or served.keys != keys or served.card.fingerprint.hex() != entry.fingerprint:
            card = await self._fetch(keys, entry)
            if card is None:
                return False
            tokenizer = await asyncio.to_thread(TextTokenizer, card.tokenizer, card.recipe)
            self.served, retired = ServedModel(keys, names, card, tokenizer), [served]
            del served
            # A tokenizer is not only made but also taken apart there: 4 ms for 30,000 entries, and some have 250,000.
            await asyncio.to_thread(retired.clear)
            log.info("fleet.model", model=entry.model, fingerprint=entry.fingerprint)
        elif served.names != names:
            self.served = replace(served, names=names)
        return True

    def _choose(self, entries: dict[str, ModelEntry]) -> ModelEntry | None:
        if self._model is not None:
            return entries.get(self._model)
        distinct = {entry.model: entry for entry in entries.values()}
        return next(iter(distinct.values())) if len(distinct) == 1 else None

    def _why_none(self, entries: dict[str, ModelEntry]) -> str:
        if not entries:
            return "No consumer has announced a model yet."
        announced = ", ".join(f"`{name}`" for name in sorted(entries))
        if self._model is None:
            return f"Several models are served; name one of them: {announced}."
        return f"No consumer has announced the model `{self._model}` (announced: {announced})."

    async def _fetch(self, keys: Keys, entry: ModelEntry) -> ModelCard | None:
        fingerprint = bytes.fromhex(entry.fingerprint)
        cached = await asyncio.to_thread(self._cache.load, fingerprint, entry.model)
        if cached is not None:
            return cached
        pieces: list[Any] = [await self._redis.get(keys.card(fingerprint, piece)) for piece in range(entry.pieces)]
        if any(piece is None for piece in pieces):
            return None
        card = await asyncio.to_thread(ModelCard.decode, pieces, fingerprint, entry.model)
        await asyncio.to_thread(self._cache.save, fingerprint, pieces)
        return card
