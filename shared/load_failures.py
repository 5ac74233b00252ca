"""Why a consumer could not serve its model: left in Redis by the consumer, for those who look from afar.

The reason itself stands under the consumer's status key and expires. A table outside the models' hash tags says which
status key is the newest for a served name, so that it is found without a search through all keys, also while no
consumer has ever announced the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from .connections import connect_sync
from .keys import Keys, failures

STATUS_TTL_S = 3600
_MOST_SHOWN = 3


def leave(redis: Redis, prefix: str, names: Sequence[str], consumer: str, reason: str) -> None:
    """Say why a consumer ends without having served.

    Args:
        redis: a client of its own.
        prefix: beginning of all keys.
        names: the served names, the one that names the queue first.
        consumer: its name in the group.
        reason: one line.

    Raises:
        RedisError: Redis is not to be had.
    """
    status = Keys(prefix, names[0]).status(consumer)
    redis.set(status, reason, ex=STATUS_TTL_S)
    redis.hset(failures(prefix), mapping=dict.fromkeys(names, status))
    redis.expire(failures(prefix), STATUS_TTL_S)


def forget(redis: Redis, prefix: str, names: Sequence[str]) -> None:
    """A consumer serves these names now: what was wrong before is no reason any more.

    Raises:
        RedisError: Redis is not to be had.
    """
    redis.hdel(failures(prefix), *names)


def newest(redis: Redis, prefix: str, name: str) -> str | None:
    """Why the last consumer of a served name could not serve it, or None where there is none such.

    Raises:
        RedisError: Redis is not to be had.
    """
    status: Any = redis.hget(failures(prefix), name)
    reason: Any = redis.get(status) if status else None
    return _text(reason)


def newest_at(url: str, prefix: str, name: str) -> str | None:
    """The same by the URL of Redis; None also where Redis is not to be had, which is not what was asked."""
    client = connect_sync(url)
    try:
        return newest(client, prefix, name)
    except (RedisError, OSError):
        return None
    finally:
        client.close()


async def told(redis: AsyncRedis, prefix: str, name: str | None) -> str | None:
    """The same for those who wait: of one served name, or of whatever failed where no name is asked for.

    Raises:
        RedisError: Redis is not to be had.
    """
    table: Any = await redis.hgetall(failures(prefix))
    statuses = dict.fromkeys(status for failed, status in table.items() if name is None or failed == name.encode())
    found: list[str] = []
    for status in statuses:
        reason: Any = await redis.get(status) if len(found) < _MOST_SHOWN else None
        if reason:  # others have expired
            found.append(reason.decode(errors="replace"))
    return " ".join(found) or None


def _text(reason: bytes | None) -> str | None:
    return reason.decode(errors="replace") if reason is not None else None
