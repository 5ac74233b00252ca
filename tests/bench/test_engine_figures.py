from __future__ import annotations

import numpy as np
import pytest
from engine_figures import (
    Setting,
    Spread,
    agree_where_both,
    batches_for,
    best,
    goes_on,
    least_cosine,
    percentile,
    ratios,
    turns,
)


def test_a_ratio_is_taken_round_by_round() -> None:
    # The second round was slow for both: the ratio of the medians would be 5, that of the rounds is 2.
    found = ratios([200.0, 20.0, 200.0], [100.0, 10.0, 40.0])
    assert found == Spread(median=2.0, least=2.0, most=5.0)
    assert found.cell() == "2.00 (2.00–5.00)"  # noqa: RUF001


def test_sides_without_the_same_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])


def test_each_round_begins_with_another_side() -> None:
    names = ["a", "b", "c"]
    orders = [turns(names, number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_a_search_takes_the_fastest_and_ends_when_it_falls() -> None:
    rising = [Setting("", 512, 100), Setting("", 1024, 140)]
    assert goes_on(rising, batch_s=0.1, most_batch_s=1)
    dip = [*rising, Setting("", 2048, 130)]
    assert goes_on(dip, batch_s=0.1, most_batch_s=1)  # one that is slower may be chance
    falling = [*dip, Setting("", 4096, 120)]
    assert not goes_on(falling, batch_s=0.1, most_batch_s=1)
    assert best(falling).budget == 1024


def test_a_search_ends_before_a_batch_takes_too_long() -> None:
    assert not goes_on([Setting("", 512, 400)], batch_s=0.6, most_batch_s=1)


@pytest.mark.parametrize(
    ("seconds", "rate", "expected"),
    [(1.0, 1000.0, 10), (1.0, 10.0, 1), (100.0, 1000.0, 50)],
    ids=["as many as fit", "at least one", "no more than there are"],
)
def test_batches_fit_the_time(seconds: float, rate: float, expected: int) -> None:
    assert batches_for(seconds, rate, tokens=5000, count=50) == expected


def test_the_least_cosine_is_that_of_the_worst_row() -> None:
    exact = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    ours = np.array([[2, 0], [0, 3], [1, 0]], np.float32)
    assert least_cosine(ours, exact) == pytest.approx(1 / np.sqrt(2))


def test_a_vector_that_is_no_number_is_not_hidden() -> None:
    exact = np.ones((2, 2), np.float32)
    assert np.isnan(least_cosine(np.array([[1, 1], [np.nan, 1]], np.float32), exact))
    assert np.isnan(least_cosine(np.zeros((2, 2), np.float32), exact))


def test_only_texts_that_both_sides_computed_are_compared() -> None:
    exact = np.array([2, 5, 7]), np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    theirs = np.array([1, 2, 7]), np.array([[5, 5], [1, 0], [1, 1]], np.float32)
    compared, cosine = agree_where_both(theirs, exact)
    assert compared == 2
    assert cosine == pytest.approx(1)
    none, unknown = agree_where_both((np.array([9]), np.ones((1, 2), np.float32)), exact)
    assert none == 0
    assert np.isnan(unknown)


def test_percentiles_are_of_a_share_of_one() -> None:
    assert percentile([1, 2, 3, 4, 5], 0.5) == 3
    assert percentile(list(range(101)), 0.9) == 90
