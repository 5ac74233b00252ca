"""Whether the server answers, asked over HTTP as its users will."""

from __future__ import annotations

import http
import http.client
import json
import time
from dataclasses import dataclass

from embedstream.shared.logs import get_logger

from .signals import Signals

_ASK_EVERY_S = 0.5
_PROGRESS_EVERY_S = 5.0
_LONGEST_REASON = 300

log = get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe path said: 200 means yes, otherwise the reason stands beside it."""

    status: int
    reason: str


class Probe:
    """One GET that waits in the background until `fileno` is readable.

    The listening socket is there before anybody accepts: a request sent early is answered as soon as a process does,
    while asking again and again would leave it a heap of dead connections.
    """

    def __init__(self, host: str, port: int, path: str) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=2.0)
        try:
            self._connection.request("GET", path, headers={"Connection": "close"})
        except OSError:
            self._connection.close()
            raise

    def fileno(self) -> int:
        """The number of the connection's open file, for `select`."""
        return int(self._connection.sock.fileno())

    def answer(self) -> Answer:
        """Read the answer and close; call it when `fileno` is readable."""
        try:
            response = self._connection.getresponse()
            return Answer(response.status, _reason_in(response.read()))
        except (OSError, http.client.HTTPException) as error:  # the process that had accepted it died
            return Answer(0, str(error))
        finally:
            self._connection.close()

    def close(self) -> None:
        """Give up."""
        self._connection.close()


class Readiness:
    """The time until the server answers for the first time: asks, and tells on stderr how it goes.

    Args:
        host: address to ask.
        port: port to ask.
        path: the path that answers 200 when all is well.
    """

    def __init__(self, host: str, port: int, path: str) -> None:
        self.is_over = False
        self._target = host, port, path
        self._probe: Probe | None = None
        self._reason = ""
        self._started_at = self._told_at = time.monotonic()
        self._next_probe_at = self._started_at

    @property
    def elapsed_s(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started_at

    def step(self, signals: Signals, longest_s: float) -> None:
        """Wait for an answer, a signal, or the time to ask or tell again."""
        now = time.monotonic()
        if self._probe is None and now >= self._next_probe_at:
            self._ask()
        next_at = self._told_at + _PROGRESS_EVERY_S
        if self._probe is None:
            next_at = min(next_at, self._next_probe_at)
        pause_s = max(0.0, min(longest_s, next_at - now))
        if signals.wait(pause_s, [] if self._probe is None else [self._probe]) and self._probe is not None:
            self._hear(self._probe.answer())
        if not self.is_over and time.monotonic() - self._told_at >= _PROGRESS_EVERY_S:
            self._told_at = time.monotonic()
            log.info("serve.not_ready_yet", elapsed_s=round(self.elapsed_s), state=self._reason or "no answer yet")

    def close(self) -> None:
        """Stop asking."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _ask(self) -> None:
        self._next_probe_at = time.monotonic() + _ASK_EVERY_S
        try:
            self._probe = Probe(*self._target)
        except OSError as error:
            self._reason = str(error)

    def _hear(self, answer: Answer) -> None:
        self._probe = None
        self._next_probe_at = time.monotonic() + _ASK_EVERY_S
        self._reason = answer.reason
        self.is_over = answer.status == http.HTTPStatus.OK


def _reason_in(body: bytes) -> str:
    """The message of an error body, or its beginning."""
    text = body.decode(errors="replace").strip()
    try:
        text = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:_LONGEST_REASON]
    return text[:_LONGEST_REASON]
