from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from embedstream.consumer.heartbeat import Heartbeat
from embedstream.consumer.watchdog import State, Watchdog
from embedstream.shared.cards import Announcement, ModelCard, ModelEntry
from embedstream.shared.connections import COMMAND_TIMEOUT_S, connect_sync
from embedstream.shared.keys import Keys, models
from embedstream.shared.recipe import Pooling, Recipe

pytestmark = pytest.mark.integration

CARD = ModelCard("m", Recipe(8, (Pooling.MEAN,), normalize=True, dimension=4, vocab_size=100), "{}", "r")
SAID = Announcement("c", "m", ("m", "o/m"), CARD.fingerprint.hex(), 4, 8, "mean", "float32", "cpu", "r", 1)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Any]:
    client = connect_sync(redis_url)
    yield client
    client.close()


@pytest.fixture
def heartbeat(redis_url: str, keys: Keys) -> Iterator[Heartbeat]:
    heartbeat = Heartbeat(redis_url, keys, CARD, SAID, interval_ms=20, ttl_ms=2000)
    yield heartbeat
    heartbeat.stop()


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_announces_the_model_and_its_card(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    heartbeat.start()
    assert Announcement.decode(redis.get(keys.heartbeat("c")) or b"") == SAID
    table = redis.hgetall(models(keys.prefix))
    assert {name.decode(): ModelEntry.decode(entry) for name, entry in table.items()} == dict.fromkeys(
        ("m", "o/m"), ModelEntry("m", CARD.fingerprint.hex(), 1)
    )
    piece = redis.get(keys.card(CARD.fingerprint, 0))
    assert ModelCard.decode([piece], CARD.fingerprint, "m") == CARD
    assert 0 < int(redis.pttl(keys.heartbeat("c"))) <= 2000


def test_the_expiry_is_on_redis_clock(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    heartbeat.start()
    (seconds, micros), score, (then_seconds, _) = redis.time(), redis.zscore(keys.live, "c"), redis.time()
    now_ms = seconds * 1000 + micros / 1000
    assert now_ms < float(score) <= (then_seconds + 1) * 1000 + 2000
    assert heartbeat.redis_now_ms() == pytest.approx(now_ms, abs=1000)


def test_a_lost_card_is_published_again(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    heartbeat.start()
    redis.delete(keys.card(CARD.fingerprint, 0), models(keys.prefix))
    eventually(lambda: redis.exists(keys.card(CARD.fingerprint, 0)) and redis.hlen(models(keys.prefix)) == 2)


def test_a_newer_revision_keeps_the_name(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    heartbeat.start()
    newer = ModelEntry("m", "ff" * 16, 1).encode()
    redis.hset(models(keys.prefix), "m", newer)
    redis.hdel(models(keys.prefix), "o/m")
    eventually(lambda: redis.hexists(models(keys.prefix), "o/m"))
    assert redis.hget(models(keys.prefix), "m") == newer


def test_a_stopped_consumer_is_gone_at_once(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    heartbeat.start()
    heartbeat.stop()
    assert not redis.exists(keys.heartbeat("c"))
    assert redis.zscore(keys.live, "c") is None


def test_the_dead_leave_the_list_of_the_living(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    redis.zadd(keys.live, {"dead": 1})
    heartbeat.start()
    assert redis.zscore(keys.live, "dead") is None


def test_it_beats_on_after_a_lost_connection(heartbeat: Heartbeat, redis: Any, keys: Keys) -> None:
    heartbeat.start()
    redis.client_kill_filter(_type="normal", skipme=True)
    redis.delete(keys.heartbeat("c"))
    eventually(lambda: redis.exists(keys.heartbeat("c")))


class Opinion(Watchdog):
    """A watchdog that thinks what it is told to."""

    def __init__(self) -> None:
        super().__init__(10)
        self.state = State.MOVING
        self.passed_s: list[float] = []

    def look(self, passed_s: float) -> State:
        self.passed_s.append(passed_s)
        return self.state


@dataclass
class Watched:
    """A heartbeat, what it asks and what it tells."""

    heartbeat: Heartbeat
    opinion: Opinion
    told: list[tuple[State, bool]]


@pytest.fixture
def watched(redis_url: str, keys: Keys, redis: Any) -> Iterator[Watched]:
    told: list[tuple[State, bool]] = []
    opinion = Opinion()

    def moved(state: State) -> None:
        told.append((state, bool(redis.exists(keys.heartbeat("c")) or redis.zscore(keys.live, "c"))))

    heartbeat = Heartbeat(redis_url, keys, CARD, SAID, 20, 60_000, opinion, lambda: 1234.56, moved)
    yield Watched(heartbeat, opinion, told)
    heartbeat.stop()


def test_a_hung_consumer_gives_its_claim_up_and_renews_it_when_it_moves(
    watched: Watched, redis: Any, keys: Keys
) -> None:
    watched.heartbeat.start()
    watched.opinion.state = State.HUNG
    eventually(lambda: watched.told)
    looks = len(watched.opinion.passed_s)
    eventually(lambda: len(watched.opinion.passed_s) > looks + 3)
    assert not redis.exists(keys.heartbeat("c"))
    assert redis.zscore(keys.live, "c") is None
    watched.opinion.state = State.MOVING
    eventually(lambda: redis.exists(keys.heartbeat("c")) and redis.zscore(keys.live, "c"))
    assert watched.told == [(State.HUNG, False), (State.MOVING, False)]


def test_what_is_lost_is_told_too(watched: Watched) -> None:
    watched.heartbeat.start()
    watched.opinion.state = State.HUNG
    eventually(lambda: len(watched.told) == 1)
    watched.opinion.state = State.LOST
    eventually(lambda: len(watched.told) == 2)
    assert watched.told == [(State.HUNG, False), (State.LOST, False)]


def test_time_in_which_the_process_was_stopped_is_not_held_against_it(watched: Watched) -> None:
    watched.heartbeat._looked_at_s -= 3600
    watched.heartbeat.start()
    eventually(lambda: len(watched.opinion.passed_s) > 2)
    assert watched.opinion.passed_s[0] == pytest.approx(0.02 + COMMAND_TIMEOUT_S)
    assert 0 < watched.opinion.passed_s[2] < 1


def test_it_tells_what_the_consumer_gets_done(watched: Watched, redis: Any, keys: Keys) -> None:
    watched.heartbeat.start()
    assert Announcement.decode(redis.get(keys.heartbeat("c")) or b"").tokens_per_s == 1234.6


def test_it_is_steady_after_a_while_without_gaps(redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(redis_url, keys, CARD, SAID, interval_ms=20, ttl_ms=1000)
    try:
        heartbeat.start()
        eventually(heartbeat.is_steady)
        beat, failures = heartbeat._beat, iter([RedisConnectionError("away")])

        def flaky() -> None:
            for error in failures:
                raise error
            beat()

        monkeypatch.setattr(heartbeat, "_beat", flaky)
        eventually(lambda: not heartbeat.is_steady())
        assert next(failures, None) is None
        eventually(heartbeat.is_steady)
    finally:
        heartbeat.stop()


def test_a_gap_longer_than_its_claim_makes_it_unsteady(redis_url: str, keys: Keys) -> None:
    """Then the claims of the others may have run out as well, without a command that failed."""
    heartbeat = Heartbeat(redis_url, keys, CARD, SAID, interval_ms=20, ttl_ms=2000)
    heartbeat._beat()
    assert heartbeat.is_steady()  # no gap so far; the thread was not started
    heartbeat._beat_at_s -= 1.0
    heartbeat._beat()
    assert heartbeat.is_steady()
    heartbeat._beat_at_s -= 2.5
    heartbeat._beat()
    assert not heartbeat.is_steady()
    heartbeat.stop()
