"""What must be true of the Redis or Valkey server, for both sides of the queue.

A server that evicts drops accepted jobs and replies without a word, and an old one lacks commands, so both are refused.
What costs safety only when something else goes wrong is told as a warning. Managed servers hide some of the answers:
what cannot be asked is a warning too.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from .connections import is_transient
from .errors import UnfitServer

OLDEST = (6, 2)
"""The commands we use on the queue are those of Redis 6.2."""
POLICY = "noeviction"
"""The one maxmemory-policy that never drops a key of ours."""

_NO_AOF = (
    "The server's append-only file is off: accepted jobs are lost when its process ends. "
    "`CONFIG SET appendonly yes` keeps them."
)
_NO_LIMIT = "The server's maxmemory is 0: nothing bounds its memory. Set it below what the machine has to give."


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a usable server said of itself.

    Args:
        server: name and version, such as `Valkey 8.1.0`; "" when it does not tell.
        maxmemory_bytes: its memory limit; 0 for none, or when it does not tell.
        warnings: sentences for the operator, one for each thing that is not as it should be or cannot be known.
    """

    server: str = ""
    maxmemory_bytes: int = 0
    warnings: tuple[str, ...] = ()


async def check_server(redis: Redis, *, embedded: bool = False) -> ServerReport:
    """Ask the server what it is, and refuse one that would lose jobs.

    One INFO; a CONFIG GET only where that does not tell the eviction policy.

    Args:
        redis: the server.
        embedded: it is that of a `serve`, which has told by itself whether the queue is kept on disk.

    Raises:
        UnfitServer: too old, or it evicts keys when its memory is full.
        RedisError: it cannot be asked now, or does not let us in.
    """
    said = await _ask(redis.info())
    if "maxmemory_policy" not in said:
        config = await _ask(redis.config_get("maxmemory*"))
        said = {_text(name).replace("-", "_"): _text(value) for name, value in config.items()} | said
    warnings = [*_check_version(said), *_check_policy(said)]
    if not embedded and str(said.get("aof_enabled")) == "0":
        warnings.append(_NO_AOF)
    maxmemory_bytes = _number(said.get("maxmemory"))
    if maxmemory_bytes == 0:
        warnings.append(_NO_LIMIT)
    return ServerReport(_server(said), maxmemory_bytes or 0, tuple(warnings))


async def _ask(question: Awaitable[Any]) -> dict[str, Any]:
    """The answer, or nothing where the server has no such command or keeps it from us."""
    try:
        answer = await question
    except ResponseError as error:  # unknown, renamed, or not for this user
        if is_transient(error):
            raise
        return {}
    return answer if isinstance(answer, dict) else {}


def _check_version(said: Mapping[str, Any]) -> list[str]:
    version = str(said.get("redis_version", ""))  # Valkey tells here which Redis it is compatible with
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    oldest = ".".join(map(str, OLDEST))
    if not numbers:
        return [f"The server does not tell its version; {oldest} or newer is needed."]
    if numbers < OLDEST:
        raise UnfitServer(
            f"The Redis server has version {version}, and {oldest} or newer is needed: "
            "update it, or name another one with --redis-url."
        )
    return []


def _check_policy(said: Mapping[str, Any]) -> list[str]:
    policy = said.get("maxmemory_policy")
    if policy is None:
        return [f"The server does not tell its maxmemory-policy; with any other than {POLICY} it may drop jobs."]
    if policy != POLICY:
        raise UnfitServer(
            f"The Redis server's maxmemory-policy is {policy}: when its memory is full it drops jobs and results. "
            f"It must be {POLICY}: `CONFIG SET maxmemory-policy {POLICY}`, and the same in its configuration file."
        )
    return []


def _server(said: Mapping[str, Any]) -> str:
    for name in ("Valkey", "Redis"):
        if version := said.get(f"{name.lower()}_version"):
            return f"{name} {version}"
    return ""


def _number(value: object) -> int | None:
    return int(str(value)) if str(value).isdecimal() else None


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
