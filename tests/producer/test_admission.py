"""The arithmetic of admission: what stands ahead, what wait that means, and when to come back."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.producer.admission import (
    ANY,
    TOTALS_FIELDS,
    UNBOUNDED_LANE_BYTES,
    Admission,
    Refusal,
    Undelivered,
    Verdict,
    result_bytes,
    tokens_of,
)
from embedstream.producer.backlog import GUESSED_JOB_TOKENS, MAX_POINTS, LaneBacklog, Totals
from embedstream.shared import metrics
from embedstream.shared.errors import Overloaded
from embedstream.shared.jobs import Job
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions, VectorType

MIB = 1024 * 1024


class Lanes:
    """A lane as Redis sees it: first in, first out, with totals beside it."""

    def __init__(self) -> None:
        self.jobs: deque[int] = deque()
        self.totals = Totals()

    def add(self, tokens: int) -> None:
        self.jobs.append(tokens)
        self.totals = Totals(self.totals.jobs + 1, self.totals.tokens + tokens, self.totals.size_bytes + 2 * tokens)

    def finish(self, count: int) -> None:
        for _ in range(min(count, len(self.jobs))):
            self.jobs.popleft()


@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 3)), min_size=1, max_size=200))
def test_what_is_on_the_lane_is_exact_where_every_job_was_seen(steps: list[tuple[int, int]]) -> None:
    lane, backlog = Lanes(), LaneBacklog()
    for tokens, finished in steps:
        lane.add(tokens)
        lane.finish(finished)
        assert not backlog.observe(len(lane.jobs), lane.totals)
        there = backlog.on_lane()
        assert (there.jobs, there.tokens, there.size_bytes) == (len(lane.jobs), sum(lane.jobs), 2 * sum(lane.jobs))


@given(st.lists(st.lists(st.integers(1, 10_000), max_size=20), min_size=1, max_size=50), st.data())
def test_between_two_samples_it_is_off_by_less_than_came_between_them(
    rounds: list[list[int]], data: st.DataObject
) -> None:
    lane, backlog = Lanes(), LaneBacklog()
    most = 0
    for added in rounds:
        for tokens in added:
            lane.add(tokens)
        most = max(most, sum(added))
        lane.finish(data.draw(st.integers(0, 25)))
        backlog.observe(len(lane.jobs), lane.totals)
        assert abs(backlog.on_lane().tokens - sum(lane.jobs)) <= most


def test_a_process_that_just_started_takes_the_mean() -> None:
    backlog = LaneBacklog()
    backlog.observe(10, Totals(1000, 50_000, 100_000))
    assert backlog.on_lane() == Totals(10, 500, 1000)


def test_a_long_history_stays_small_and_nearly_exact() -> None:
    lane, backlog = Lanes(), LaneBacklog()
    for number in range(10 * MAX_POINTS):
        lane.add(1 + number)
        backlog.observe(len(lane.jobs), lane.totals)
        assert len(backlog._points) <= MAX_POINTS
    lane.finish(3 * MAX_POINTS)
    backlog.observe(len(lane.jobs), lane.totals)
    assert backlog.on_lane().tokens == pytest.approx(sum(lane.jobs), rel=0.01)


def test_lost_totals_are_told_and_forgotten() -> None:
    backlog = LaneBacklog()
    backlog.observe(900, Totals(900, 1_000, 1_000))
    backlog.observe(1000, Totals(1000, 1_000_000, 1_000_000))
    assert backlog.observe(2, Totals(4, 60, 120))
    assert backlog.on_lane() == Totals(2, 30, 60)
    assert not backlog.observe(2, Totals(4, 60, 120))


def test_jobs_of_senders_without_totals_count_as_the_others() -> None:
    backlog = LaneBacklog()
    backlog.observe(100, Totals(10, 500, 1000))
    assert backlog.on_lane() == Totals(100, 5000, 10_000)
    backlog = LaneBacklog()
    backlog.observe(0, Totals(10, 100, 100))
    backlog.observe(2, Totals(12, 2100, 2100))
    backlog.observe(4, Totals(12, 2100, 2100))  # two more, and they are like the last two
    assert backlog.on_lane().tokens == 4000
    backlog = LaneBacklog()
    backlog.observe(3, Totals())
    assert backlog.on_lane().tokens == 3 * GUESSED_JOB_TOKENS


def admission(interactive: int = 0, bulk: int = 0, rate: float = 1000.0, **options: float) -> Admission:
    """Lanes that hold so many jobs of 100 tokens and 1000 bytes."""
    made = Admission(options.get("max_wait_s", 10.0), int(options.get("max_lane_bytes", 0)))
    sums = [str(count * each).encode() for count in (interactive, bulk) for each in (1, 100, 1000)]
    made.observe([interactive, bulk], sums)
    made.tokens_per_s = rate
    return made


def test_the_wait_is_the_work_ahead_over_the_speed_of_the_fleet() -> None:
    assert admission(50).wait_s(Lane.INTERACTIVE) == 5.0
    assert admission(50, rate=0).wait_s(Lane.INTERACTIVE) == 0.0
    assert admission(45, bulk=1).wait_s(Lane.INTERACTIVE) == pytest.approx(5.0)  # bulk takes its share


def test_bulk_waits_for_interactive_as_far_as_its_share_goes() -> None:
    assert admission(50, bulk=50).wait_s(Lane.BULK) == 10.0
    assert admission(5000, bulk=50).wait_s(Lane.BULK) == 50.0  # a tenth of the fleet is its own
    assert admission(5000).wait_s(Lane.BULK) == 0.0


def test_the_lanes_are_shown() -> None:
    admission(50, bulk=20).terms(Lane.BULK, 60)
    value = metrics.LANE_JOBS.labels(Lane.BULK)._value.get()
    assert value == 20
    assert metrics.LANE_BYTES.labels(Lane.BULK)._value.get() == 20_000


def test_the_target_is_the_smaller_limit() -> None:
    assert admission().terms(Lane.INTERACTIVE, 60).target_s == 10
    assert admission().terms(Lane.INTERACTIVE, 5).target_s == 4
    assert admission().terms(Lane.INTERACTIVE, -1).target_s == 0
    assert admission().terms(Lane.INTERACTIVE, 60).most_tokens == 10_000
    assert admission(bulk=1).terms(Lane.INTERACTIVE, 60).most_tokens == 9000
    assert admission(rate=0).terms(Lane.INTERACTIVE, 60).most_tokens == ANY


def test_a_refusal_names_limit_and_value_and_when_the_work_is_done() -> None:
    terms = admission().terms(Lane.INTERACTIVE, 60)
    waits = []
    for _ in range(200):
        error = terms.overloaded(Verdict(Refusal.WAIT, 12_400, 0), 10)
        assert str(error) == "The interactive lane holds about 12.4 s of work, more than 10.0 s (--max-wait-s)."
        waits.append(error.retry_after_s)
    assert 0.9 * 12.4 <= min(waits) < max(waits) <= 1.1 * 12.4
    error = admission().terms(Lane.BULK, 5).overloaded(Verdict(Refusal.WAIT, 6000, 0), 10)
    assert "bulk lane holds about 6.0 s of work, more than 4.0 s (80% of the 5.0 s to the request" in str(error)


def test_a_full_lane_is_worth_another_try_when_enough_has_gone() -> None:
    terms = admission(max_lane_bytes=1000).terms(Lane.INTERACTIVE, 60)
    error = terms.overloaded(Verdict(Refusal.BYTES, 20_000, 900), 500)
    assert "holds 900 bytes of jobs; with the 500 of this request it would exceed its limit of 1,000 bytes" in str(
        error
    )
    assert error.retry_after_s == pytest.approx(20 * 400 / 900, rel=0.101)
    larger = terms.overloaded(Verdict(Refusal.BYTES, 20_000, 900), 5000)  # the lane must be empty first
    assert larger.retry_after_s == pytest.approx(20, rel=0.101)
    unknown = admission(rate=0).terms(Lane.INTERACTIVE, 60).overloaded(Verdict(Refusal.BYTES, 20_000, 900), 500)
    assert unknown.retry_after_s == 1.0


def test_the_bytes_of_a_lane_follow_from_the_servers_memory() -> None:
    made = admission()
    assert made.lane_limit_bytes(Lane.BULK) == UNBOUNDED_LANE_BYTES
    made.maxmemory_bytes = 1000 * MIB
    assert made.lane_limit_bytes(Lane.INTERACTIVE) == 200 * MIB
    assert made.lane_limit_bytes(Lane.BULK) == 300 * MIB
    assert admission(max_lane_bytes=7).lane_limit_bytes(Lane.BULK) == 7


def test_damaged_totals_count_as_none() -> None:
    made = Admission(10, 0)
    assert len(TOTALS_FIELDS) == 6
    made.observe([3, 0], [b"many", None, b"-5", None, None, None])
    made.tokens_per_s = 1000
    assert made.wait_s(Lane.INTERACTIVE) == 3 * GUESSED_JOB_TOKENS / 1000


def test_text_is_counted_by_its_bytes() -> None:
    lengths = np.array([5, 6], np.uint32)
    assert tokens_of(Job(bytes(16), 0, 1, 0, 1, lengths, texts=("aaaaa", "bbbbbb"))) == 3
    assert tokens_of(Job(bytes(16), 0, 1, 0, 1, lengths, ids=np.zeros(11, np.uint16))) == 11


def test_results_under_way_are_bounded() -> None:
    undelivered = Undelivered(1000)
    refused = r"waits for 5,000 bytes .* limit of 1,000 bytes \(--max-undelivered-bytes"
    with (
        undelivered.expecting(5000),  # nothing else is under way
        pytest.raises(Overloaded, match=refused),
        undelivered.expecting(1),
    ):
        raise AssertionError
    with (
        undelivered.expecting(600),
        undelivered.expecting(400),
        pytest.raises(Overloaded),
        undelivered.expecting(1),
    ):
        raise AssertionError
    with pytest.raises(ValueError, match="inner"), undelivered.expecting(900):
        raise ValueError("inner")
    with undelivered.expecting(900):
        assert metrics.UNDELIVERED_BYTES._value.get() == 900
    assert metrics.UNDELIVERED_BYTES._value.get() == 0


def test_the_size_of_a_result_is_known_before() -> None:
    assert result_bytes(VectorOptions(), 3, 100, 384) == 3 * 384 * 4
    assert result_bytes(VectorOptions(64, dtype=VectorType.FLOAT16), 3, 100, 384) == 3 * 64 * 2
    assert result_bytes(VectorOptions(per_token=True, dtype=VectorType.FP8_E4M3), 3, 100, 384) == 100 * 384
