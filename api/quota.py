"""What each key may use: tokens a second, with a burst, in one bucket for all API processes.

The bucket lies in Redis, beside the queue. When Redis does not answer, requests pass unchecked: the queue, which lies
in the same place, refuses them then with a better reason.
"""

from __future__ import annotations

import asyncio
import math

from redis.exceptions import RedisError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream.producer import Producer
from embedstream.shared import metrics
from embedstream.shared.errors import Overloaded, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger, told
from embedstream.shared.settings import Settings

from .buckets import Bucket, Buckets
from .context import Context, context_of
from .errors import RateLimited

_OTHER_KEYS = "other"
_PATIENCE_S = 1.0
"""How long a request waits to hear of its quota: less than for the queue, which then has the better reason."""

log = get_logger()


class Quota:
    """The quotas of all keys.

    Args:
        producer: whose connection to Redis it shares, and who knows the model.
        settings: where the keys of Redis begin, and how many keys metrics tell apart.
    """

    def __init__(self, producer: Producer, settings: Settings) -> None:
        self._producer = producer
        self._settings = settings
        self._buckets = Buckets(lambda: producer.redis)
        self._labels: set[str] = set()
        self._silent = False

    async def charge(self, context: Context, tokens: int) -> None:
        """Take a request's tokens from the quota of its key, before anything is queued.

        A request larger than the whole burst passes when the bucket is full, and the key then waits the longer for its
        next. The answer, whichever it will be, gets the headers `x-ratelimit-*-tokens`.

        Raises:
            RateLimited: the quota is used up.
        """
        caller = context.caller
        if caller is None:
            return
        if caller.tokens_per_s is not None:
            bucket = await self._ask(caller.name, tokens, caller.tokens_per_s, caller.burst_tokens)
            if bucket is None:
                metrics.QUOTA_UNCHECKED.inc()
            else:
                context.headers |= _headers(caller.tokens_per_s, caller.burst_tokens, bucket.tokens)
                if not bucket.taken:
                    metrics.QUOTA_REFUSALS.labels(self._label(caller.name)).inc()
                    raise RateLimited(
                        f"The quota of the key `{caller.name}` is used up: {caller.tokens_per_s:.15g} tokens a second, "
                        f"at most {caller.burst_tokens:.15g} at once. This request has {tokens}, and "
                        f"{max(0, math.floor(bucket.tokens))} are left; it can be taken in {bucket.wait_s:.1f} s.",
                        retry_after_s=bucket.wait_s,
                    )
                context.taken_tokens += tokens
        context.charged_tokens += tokens

    async def settle(self, context: Context, *, accepted: bool) -> None:
        """Book what was charged when a request is over; what the queue did not accept is given back."""
        caller, tokens, taken = context.caller, context.charged_tokens, context.taken_tokens
        context.charged_tokens = context.taken_tokens = 0
        if caller is None or not tokens:
            return
        if accepted:
            metrics.KEY_TOKENS.labels(self._label(caller.name)).inc(tokens)
        elif taken and caller.tokens_per_s is not None:
            bucket = await self._ask(caller.name, -taken, caller.tokens_per_s, caller.burst_tokens)
            if bucket is not None:
                context.headers |= _headers(caller.tokens_per_s, caller.burst_tokens, bucket.tokens)

    async def _ask(self, name: str, tokens: int, tokens_per_s: float, burst_tokens: float) -> Bucket | None:
        """Take tokens, or give them back when they are below 0; None when Redis does not say in good time."""
        try:
            if not self._producer.fleet.redis_ok:  # known already: no need to wait for it
                raise ConnectionError("Redis cannot be reached.")
            async with asyncio.timeout(_PATIENCE_S):
                key = self._keys().quota(name)
                bucket = await self._buckets.take(key, tokens, tokens_per_s=tokens_per_s, burst_tokens=burst_tokens)
        except (RedisError, OSError) as error:  # TimeoutError is one
            if not self._silent:  # once for each time that it is away
                log.warning("quota.unchecked", error=told(error))
            self._silent = True
            return None
        self._silent = False
        return bucket

    def _keys(self) -> Keys:
        served = self._producer.fleet.served
        return served.keys if served else Keys(self._settings.key_prefix, self._settings.served_names[0])

    def _label(self, name: str) -> str:
        """The key's name in metrics. Files change, and each name that was ever counted stays: so they are bounded."""
        if name not in self._labels:
            if len(self._labels) >= self._settings.key_labels:
                return _OTHER_KEYS
            self._labels.add(name)
        return name


class Settlement:
    """Middleware that books each request's tokens, or gives them back when the queue refused it.

    Args:
        app: what charges.
        quota: what was charged.
    """

    def __init__(self, app: ASGIApp, quota: Quota) -> None:
        self.app = app
        self._quota = quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; then what was charged is settled."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        accepted = True
        try:
            await self.app(scope, receive, watch)
        except (Overloaded, Unavailable):
            accepted = started  # after the first vectors the device has worked for it
            raise
        finally:
            await self._quota.settle(context_of(scope), accepted=accepted)


def _headers(tokens_per_s: float, burst_tokens: float, tokens: float) -> dict[str, str]:
    """The headers in the form that OpenAI gave them."""
    return {
        "x-ratelimit-limit-tokens": str(math.floor(burst_tokens)),
        "x-ratelimit-remaining-tokens": str(max(0, math.floor(tokens))),
        "x-ratelimit-reset-tokens": _duration((burst_tokens - tokens) / tokens_per_s),
    }


def _duration(seconds: float) -> str:
    """Such as `12ms`, `1.5s` or `6m0s`, rounded up: after it the bucket is full."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    text = f"{ms / 1000:g}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text
