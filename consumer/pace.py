"""The pace: how long batches take here, learned from those that ran.

Three things rest on it: how long a batch may run before it counts as hung, how much bulk work fits a latency slice,
and what the fleet can compute in a second, by which callers are admitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cost import CostModel

_NEW = 0.2
"""Weight of the newest batch in the averages: a change of load shows after about five batches."""
_WINDOW_S = 0.5
"""Shortest stretch of unbroken work that tells a rate."""
_REMEMBERED_S = 30.0
"""How long a measured rate is believed once the device has slack again."""


@dataclass(slots=True)
class _Size:
    """Batches of about one size: averages of their cost and of their time."""

    cost: float
    seconds: float


class Pace:
    """Times of batches by their cost. One thread writes; others may read at any moment.

    Args:
        budget: cost of a full batch, in tokens.
        costs: what batches cost here.
    """

    def __init__(self, budget: int, costs: CostModel = CostModel()) -> None:  # noqa: B008 - frozen
        self.costs = costs
        self._budget = budget
        self._sizes: dict[int, _Size] = {}  # by the bit length of the cost: each is twice as large as the one before
        self._density = 1.0  # tokens for each unit of cost
        self._window_s = 0.0
        self._window_tokens = 0
        self._rate = 0.0
        self._rate_at_s = float("-inf")
        self._now_s = 0.0

    def observe(self, cost: int, tokens: int, seconds: float) -> None:
        """Learn from a batch.

        Args:
            cost: at least 1.
            tokens: without padding.
            seconds: of the forward pass and the pooling.
        """
        known = self._sizes.get(cost.bit_length())
        if known is None:
            self._sizes[cost.bit_length()] = _Size(float(cost), seconds)
        else:
            known.cost += _NEW * (cost - known.cost)
            known.seconds += _NEW * (seconds - known.seconds)
        self._density += _NEW * (tokens / cost - self._density)

    def observe_turn(self, tokens: int, seconds: float, now_s: float, *, more_waits: bool) -> None:
        """Learn what the device really gets done, all that happens between batches included.

        Args:
            tokens: of the batch that has just ended.
            seconds: since the batch before it ended.
            now_s: on a monotonic clock.
            more_waits: whether rows were waiting all the while; only unbroken work tells a rate.
        """
        self._now_s = now_s
        if not more_waits:
            self._window_s, self._window_tokens = 0.0, 0
            return
        self._window_s += seconds
        self._window_tokens += tokens
        if self._window_s < _WINDOW_S:
            return
        rate = self._window_tokens / self._window_s
        stale = now_s - self._rate_at_s > _REMEMBERED_S
        self._rate = rate if stale else self._rate + 2 * _NEW * (rate - self._rate)
        self._rate_at_s = now_s
        self._window_s, self._window_tokens = 0.0, 0

    def predict_s(self, cost: int) -> float | None:
        """Time of a batch, or None while nothing is known.

        Between two known sizes it is interpolated; beyond the largest it grows in proportion, below the smallest it
        stays: both err on the long side for what is asked here.
        """
        sizes = sorted(self._sizes.values(), key=lambda size: size.cost)
        if not sizes:
            return None
        above = next((place for place, size in enumerate(sizes) if size.cost >= cost), None)
        if above is None:
            return sizes[-1].seconds * cost / sizes[-1].cost
        if above == 0:
            return sizes[0].seconds
        low, high = sizes[above - 1], sizes[above]
        return low.seconds + (high.seconds - low.seconds) * (cost - low.cost) / max(1.0, high.cost - low.cost)

    def fitting(self, seconds: float) -> int:
        """The largest cost of a batch that is predicted to take no longer; a full batch while nothing is known."""
        if (self.predict_s(self._budget) or 0.0) <= seconds:
            return self._budget
        low, high = 1, self._budget
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            if (self.predict_s(middle) or 0.0) <= seconds:
                low = middle
            else:
                high = middle
        return low

    def tokens_per_s(self) -> float:
        """What the device gets done when it has enough to do; 0 while nothing is known.

        Measured where there was unbroken work lately, else predicted for full batches. Small ones alone tell nothing:
        most of their time may be the same for a full batch, and callers would be refused for a wait that is none.
        """
        if self._rate and self._now_s - self._rate_at_s <= _REMEMBERED_S:
            return self._rate
        seconds = self.predict_s(self._budget)
        sizes = list(self._sizes.values())  # at once, for the other thread may add one
        largest = max((size.cost for size in sizes), default=0.0)
        return 0.0 if not seconds or 2 * largest < self._budget else self._density * self._budget / seconds
