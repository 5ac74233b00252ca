"""Whether a question that is asked of Redis again and again is answered, and what is wrong when it is not."""

from __future__ import annotations

import asyncio

from redis.exceptions import RedisError

from embedstream.shared.connections import is_refusal, is_transient
from embedstream.shared.errors import UnfitServer
from embedstream.shared.logs import get_logger, told

GRACE_S = 2.0
"""For what passes by itself: a lost reply, or a server that restarts, is over before a caller need hear of it."""

log = get_logger()


class Contact:
    """What came of asking one question. Each has its own: that one is answered says nothing of another.

    Args:
        where: the URL of Redis as it may be shown, for log lines.
        subject: what is asked for, as a sentence about it begins.
    """

    def __init__(self, where: str, subject: str) -> None:
        self._where = where
        self._subject = subject
        self._heard_s = float("-inf")
        self.ok = False
        """Whether Redis answers it."""
        self.trouble: str | None = None
        """Why it has no answer, or None."""

    def heard(self) -> None:
        """Redis has answered."""
        self._heard_s = asyncio.get_running_loop().time()
        self.ok, self.trouble = True, None

    def failed(self, error: Exception) -> None:
        """It was asked in vain. Only what may pass by itself is borne for a while; the same trouble is logged once."""
        if isinstance(error, UnfitServer):
            self._in_trouble(str(error), "fleet.unfit_server", error)
        elif not isinstance(error, (RedisError, OSError)):  # a defect, or what somebody wrote: Redis itself answers
            trouble = f"{self._subject} cannot be read: {error}"
            if trouble != self.trouble:
                log.error("fleet.failed", exc_info=error)
            self.trouble = trouble
        elif is_refusal(error):
            self._in_trouble(f"Redis refuses us: {error}", "fleet.redis_refuses", error)
        elif not is_transient(error):
            self._in_trouble(f"{self._subject} cannot be read: {error}", "fleet.redis_refuses", error)
        elif asyncio.get_running_loop().time() - self._heard_s > GRACE_S:
            self._in_trouble("Redis cannot be reached.", "fleet.redis_away", error)

    def _in_trouble(self, trouble: str, event: str, error: Exception) -> None:
        if trouble != self.trouble:
            log.warning(event, redis=self._where, error=told(error))
        self.ok, self.trouble = False, trouble
