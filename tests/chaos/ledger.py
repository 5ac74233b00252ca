"""The ledger: every request with what came of it, kept outside of all that is tested."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

from .http import Answer
from .requests import Asked


class Outcome(StrEnum):
    """How a request ended.

    A refusal was given before the request was accepted. Everything else but `ok` and `left` is a broken promise, as
    long as the deadline leaves time for what was broken to be mended; `failed` and `cut` may be meant to happen.
    """

    OK = "ok"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    FAILED = "failed"
    WRONG = "wrong"
    CUT = "cut"
    HUNG = "hung"
    LEFT = "left"


@dataclass
class Line:
    """One request; times are on the monotonic clock, `queue_s` is what the API says it waited for its forward pass."""

    asked: Asked
    sent_s: float
    ended_s: float | None = None
    outcome: Outcome | None = None
    status: int = 0
    detail: str = ""
    retry_after_s: float = 0.0
    queue_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """From sending it to its end, or to now."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.sent_s

    def __str__(self) -> str:
        return (
            f"request {self.asked.number} ({len(self.asked.inputs)} inputs): {self.outcome or 'no answer yet'} "
            f"{self.status or ''} after {self.wait_s:.1f} s {self.detail}"
        )


_OF_STATUS = {200: Outcome.OK, 429: Outcome.REFUSED, 503: Outcome.REFUSED, 504: Outcome.TIMEOUT}


class Ledger:
    """All requests of one round."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def open(self, asked: Asked) -> Line:
        """Note a request that is about to be sent."""
        line = Line(asked, time.monotonic())
        self.lines.append(line)
        return line

    @staticmethod
    def settle(line: Line, answer: Answer) -> None:
        """Note a response, and compare its vectors."""
        line.ended_s = time.monotonic()
        line.status = answer.status
        line.outcome = _OF_STATUS.get(answer.status, Outcome.FAILED)
        line.queue_s = float(answer.headers.get("x-queue-time-ms", 0)) / 1000
        line.retry_after_s = float(answer.headers.get("retry-after", 0))
        if line.outcome is not Outcome.OK:
            line.detail = answer.body[:200].decode(errors="replace")
        elif line.asked.poisoned or not line.asked.is_answered_by(answer.body):
            line.outcome, line.detail = Outcome.WRONG, repr(answer.body[:80])

    @staticmethod
    def end(line: Line, outcome: Outcome, detail: str = "") -> None:
        """Note an end without a response."""
        line.ended_s, line.outcome, line.detail = time.monotonic(), outcome, detail

    def of(self, *outcomes: Outcome) -> list[Line]:
        """The requests that ended so."""
        return [line for line in self.lines if line.outcome in outcomes]

    def count(self, *outcomes: Outcome) -> int:
        """How many ended so."""
        return len(self.of(*outcomes))

    def lost(self) -> list[Line]:
        """Requests without their vectors although nobody was refused, hung up or meant to fail."""
        broken = self.of(Outcome.TIMEOUT, Outcome.FAILED, Outcome.CUT)
        return [line for line in broken if not (line.asked.poisoned and line.outcome is Outcome.FAILED)]

    def worst_s(self) -> float:
        """The longest wait of a request that got its vectors."""
        return max((line.wait_s for line in self.of(Outcome.OK)), default=0.0)

    def under_way(self, at_s: float) -> list[Line]:
        """Requests that waited at a moment."""
        return [line for line in self.lines if line.sent_s <= at_s and (line.ended_s is None or line.ended_s > at_s)]

    def settled_after_s(self, at_s: float) -> float:
        """Seconds until all that waited at a moment had their answer."""
        return max((line.sent_s + line.wait_s - at_s for line in self.under_way(at_s)), default=0.0)

    def first_ok_after_s(self, at_s: float) -> float:
        """Seconds until the first vectors after a moment, to whomever; infinite when there were none."""
        ends = [line.ended_s - at_s for line in self.of(Outcome.OK) if line.ended_s is not None and line.ended_s > at_s]
        return min(ends, default=float("inf"))

    def served_after_s(self, at_s: float) -> float:
        """Seconds until a request that was sent after a moment got its vectors; infinite when none did."""
        later = [line for line in self.of(Outcome.OK) if line.sent_s > at_s]
        return min((line.sent_s + line.wait_s - at_s for line in later), default=float("inf"))
