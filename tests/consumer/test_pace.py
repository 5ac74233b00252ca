from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.consumer.pace import Pace

costs = st.lists(st.integers(1, 8192), min_size=1, max_size=30)


def seconds(cost: int) -> float:
    """A device with 2 ms for each pass and 10,000 tokens a second."""
    return 0.002 + cost / 10_000


def learned(costs: list[int], budget: int = 8192) -> Pace:
    pace = Pace(budget)
    for cost in costs:
        pace.observe(cost, cost, seconds(cost))
    return pace


@given(costs)
def test_predictions_lie_between_what_was_seen_and_on_the_long_side_beyond(seen: list[int]) -> None:
    pace = learned(seen)
    predictions = [pace.predict_s(cost) or 0.0 for cost in range(1, 9000, 97)]
    assert predictions == sorted(predictions)
    for cost in range(1, 9000, 97):
        predicted = pace.predict_s(cost)
        assert predicted is not None
        assert predicted >= seconds(cost) * 0.999
    known = [size.cost for size in pace._sizes.values()]  # averages of a line lie on it, and so does what is between
    for cost in range(math.ceil(min(known)), int(max(known)) + 1, 97):
        assert pace.predict_s(cost) == pytest.approx(seconds(cost), rel=1e-3)


@given(costs, st.floats(0.0001, 2))
def test_fitting_is_the_inverse_of_the_prediction(seen: list[int], slice_s: float) -> None:
    pace = learned(seen)
    fitting = pace.fitting(slice_s)
    assert 1 <= fitting <= 8192
    assert fitting == 1 or (pace.predict_s(fitting) or 0.0) <= slice_s
    wider = fitting + max(1, fitting // 16) + 1
    assert wider > 8192 or (pace.predict_s(wider) or 0.0) > slice_s


def test_while_nothing_is_known_nothing_is_limited() -> None:
    pace = Pace(4096)
    assert pace.predict_s(10) is None
    assert pace.fitting(0.001) == 4096
    assert pace.tokens_per_s() == 0


def test_it_follows_a_device_that_becomes_slower() -> None:
    pace = Pace(1024)
    pace.observe(1000, 1000, 0.1)
    for _ in range(30):
        pace.observe(1000, 1000, 0.4)
    assert pace.predict_s(1000) == pytest.approx(0.4, rel=0.01)


def test_the_rate_is_predicted_for_full_batches_until_it_is_measured() -> None:
    pace = Pace(1000)
    for _ in range(40):
        pace.observe(1000, 500, 0.1)  # half of it padding
    assert pace.tokens_per_s() == pytest.approx(5000, rel=0.01)
    for turn in range(10):
        pace.observe_turn(300, 0.1, turn / 10, more_waits=True)
    assert pace.tokens_per_s() == pytest.approx(3000)  # what lies between the batches counts


def test_small_batches_do_not_tell_what_full_ones_do() -> None:
    """A pass that takes 0.15 s for anything: 20 tokens in it do not mean 133 a second."""
    pace = Pace(1000)
    for _ in range(20):
        pace.observe(20, 20, 0.15)
    assert pace.tokens_per_s() == 0
    pace.observe(600, 600, 0.15)
    assert pace.tokens_per_s() == pytest.approx(600 / 0.15)


def test_only_unbroken_work_tells_a_rate() -> None:
    pace = Pace(1000)
    pace.observe(1000, 1000, 0.1)
    for turn in range(50):  # never more than 0.4 s at a stretch
        pace.observe_turn(10, 0.1, turn / 10, more_waits=turn % 5 != 0)
    assert pace.tokens_per_s() == pytest.approx(10_000)


def test_an_old_rate_is_forgotten() -> None:
    pace = Pace(1000)
    pace.observe(1000, 1000, 0.1)
    for turn in range(10):
        pace.observe_turn(100, 0.1, turn / 10, more_waits=True)
    assert pace.tokens_per_s() == pytest.approx(1000)
    pace.observe_turn(1, 0.1, 20, more_waits=False)
    assert pace.tokens_per_s() == pytest.approx(1000)
    pace.observe_turn(1, 0.1, 40, more_waits=False)
    assert pace.tokens_per_s() == pytest.approx(10_000)
    for turn in range(5):  # and the next one counts in full
        pace.observe_turn(200, 0.1, 40 + turn / 10, more_waits=True)
    assert pace.tokens_per_s() == pytest.approx(2000)
