"""The fleet as a caller sees it: which consumers are alive, which model they serve, and its card."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.cards import Announcement, CardCache, ModelCard, ModelEntry
from embedstream.shared.connections import after_failure, is_refusal, pause
from embedstream.shared.errors import MalformedMessage, Unavailable
from embedstream.shared.keys import Keys, models
from embedstream.shared.logs import get_logger
from embedstream.shared.tokenization import TextTokenizer

POLL_S = 0.5
_STALE_S = 2.0
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


class Fleet:
    """Follows the fleet by polling; questions are answered from memory, so a probe never waits for Redis.

    Args:
        redis: client for short commands.
        prefix: beginning of all keys.
        model: a served name; None for the only model there is.
        cache: where cards are kept on disk.
        where: the URL of Redis as it may be shown, for log lines.
    """

    def __init__(self, redis: Redis, prefix: str, model: str | None, cache: CardCache, where: str) -> None:
        self._redis = redis
        self._where = where
        self._prefix = prefix
        self._model = model
        self._cache = cache
        self._checked_s = float("-inf")
        self._trouble: str | None = "Redis has not been asked yet."
        self._unreadable: set[bytes] = set()  # values already complained about
        self._refreshing: asyncio.Task[None] | None = None
        self.redis_ok = False
        self.served: ServedModel | None = None
        self.consumers: tuple[Announcement, ...] = ()

    @property
    def trouble(self) -> str | None:
        """Why a request would not be answered now, or None."""
        return self._trouble

    async def run(self, stopping: asyncio.Event) -> None:
        """Poll until `stopping` is set."""
        while not stopping.is_set():
            await self.refresh()
            await pause(POLL_S, stopping)

    async def refresh(self) -> None:
        """Ask Redis now; a failure is remembered as the trouble. All who ask at one time share one question."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._ask())
        await asyncio.shield(self._refreshing)  # a caller who gives up must not stop it for the others

    async def _ask(self) -> None:
        try:
            await self._refresh()
            self.redis_ok = True
        except (RedisError, OSError) as error:
            trouble = f"Redis refuses us: {error}" if is_refusal(error) else "Redis cannot be reached."
            if trouble != self._trouble:
                log.warning("fleet.redis_away", redis=self._where, error=repr(error))
            self.redis_ok = False
            self._trouble = trouble
            await after_failure(self._redis, error)
        except Exception as error:  # whatever somebody wrote into these keys must not end the polling
            trouble = f"What consumers announce cannot be read: {error}"
            if trouble != self._trouble:
                log.exception("fleet.failed")
            self._trouble = trouble
        self._checked_s = asyncio.get_running_loop().time()

    async def live(self) -> ServedModel:
        """The model, when somebody serves it now.

        Raises:
            Unavailable: no consumer, no such model, or no Redis.
        """
        age_s = asyncio.get_running_loop().time() - self._checked_s
        if self._trouble is not None or age_s > _STALE_S:  # good news is worth a question
            await self.refresh()
        if self._trouble is not None or self.served is None:
            raise Unavailable(self._trouble or "No consumer is alive.", retry_after_s=2.0)
        return self.served

    async def _refresh(self) -> None:
        table: Any = await self._redis.hgetall(models(self._prefix))
        entries = {name.decode(): entry for name, value in table.items() if (entry := self._read(ModelEntry, value))}
        if self._model is None and len({entry.model for entry in entries.values()}) > 1:
            entries = await self._living(entries)  # the table remembers models that nobody serves any more
        entry = self._choose(entries)
        if entry is None:
            self.consumers = ()
            self._trouble = self._why_none(entries)
            return
        keys = Keys(self._prefix, entry.model)
        members: Any = await self._redis.zrange(keys.live, 0, -1)
        beats: Any = await self._redis.mget([keys.heartbeat(name.decode()) for name in members]) if members else ()
        self.consumers = tuple(said for beat in beats if beat and (said := self._read(Announcement, beat)))
        if self.consumers:
            # Not what the table says: its last writer may have gone again, and left an older revision alone.
            entry = max(self.consumers, key=lambda said: (said.started_s, said.consumer)).card
        names = (entry.model, *(name for name, other in entries.items() if other.model == entry.model != name))
        if not await self._follow(keys, names, entry):
            self._trouble = f"The card of `{entry.model}` is not in Redis yet."
            return
        self._trouble = None if self.consumers else f"No consumer of `{entry.model}` is alive."

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
            self.served = ServedModel(keys, names, card, tokenizer)
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
