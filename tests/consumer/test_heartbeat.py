from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embedstream.consumer.heartbeat import Heartbeat
from embedstream.shared.cards import Announcement, ModelCard, ModelEntry
from embedstream.shared.connections import connect_sync
from embedstream.shared.keys import Keys, models
from embedstream.shared.recipe import Pooling, Recipe

pytestmark = pytest.mark.integration

CARD = ModelCard("m", Recipe(8, Pooling.MEAN, normalize=True, dimension=4, vocab_size=100), "{}", "r")
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
    seconds, micros = redis.time()
    now_ms = seconds * 1000 + micros / 1000
    score = redis.zscore(keys.live, "c")
    assert now_ms < float(score) <= now_ms + 2000
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
