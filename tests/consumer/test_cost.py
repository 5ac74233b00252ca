from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedstream.consumer.cost import LIKE, LIKE_TOKENS, CostModel

PADDED = CostModel()
models = st.builds(CostModel, st.booleans(), st.sampled_from([0, 50, 700]))
rows_of_tokens = st.lists(st.integers(1, 600), min_size=1, max_size=120)
budgets = st.integers(1, 8192)


def column(lengths: list[int]) -> NDArray[np.int64]:
    return np.array(lengths, np.int64)


@given(rows_of_tokens)
def test_without_a_knee_a_token_costs_one(lengths: list[int]) -> None:
    assert CostModel(fills_up=False).of(column(lengths)) == sum(lengths)
    assert CostModel(fills_up=True).of(column(lengths)) == max(lengths) * len(lengths)


def test_at_the_knee_attention_doubles_the_cost() -> None:
    packed, padded = CostModel(fills_up=False, knee=512), CostModel(knee=512)
    assert packed.of_rows(column([10, 512, 1024])).tolist() == [10, 1024, 3072]
    assert packed.of(column([10, 512, 1024])) == 10 + 1024 + 3072
    assert padded.of(column([10, 512, 1024])) == 3 * 3072
    assert packed.of(column([])) == padded.of(column([])) == 0


@given(rows_of_tokens, budgets, models)
def test_a_choice_fits_and_holds_the_oldest(lengths: list[int], budget: int, costs: CostModel) -> None:
    rows = column(lengths)
    places = costs.choose(rows, budget)
    assert 0 in places
    assert len(set(places.tolist())) == len(places)
    assert len(places) == 1 or costs.of(rows[places]) <= budget
    assert (np.diff(rows[places]) <= 0).all()  # longest first


@given(rows_of_tokens, budgets, st.sampled_from([0, 50, 700]))
def test_without_padding_nothing_that_would_fit_is_left(lengths: list[int], budget: int, knee: int) -> None:
    rows, costs = column(lengths), CostModel(fills_up=False, knee=knee)
    places = costs.choose(rows, budget)
    left = np.delete(np.arange(len(rows)), places)
    room = budget - costs.of(rows[places])
    assert (costs.of_rows(rows[left]) > room).all()


@given(rows_of_tokens, budgets, st.sampled_from([0, 50, 700]))
def test_with_padding_a_group_has_like_lengths(lengths: list[int], budget: int, knee: int) -> None:
    rows = column(lengths)
    chosen = rows[CostModel(knee=knee).choose(rows, budget)]
    assert chosen.max() <= LIKE * chosen.min() + LIKE_TOKENS


@given(rows_of_tokens, budgets, models)
def test_all_rows_get_their_turn(lengths: list[int], budget: int, costs: CostModel) -> None:
    rows = column(lengths)
    for left in range(len(rows), 0, -1):
        if not len(rows):
            break
        assert len(rows) <= left
        rows = np.delete(rows, costs.choose(rows, budget))
    assert not len(rows)


def turns(lengths: NDArray[np.int64], budget: int, costs: CostModel) -> list[NDArray[np.int64]]:
    found = []
    while len(lengths):
        places = costs.choose(lengths, budget)
        found.append(lengths[places])
        lengths = np.delete(lengths, places)
    return found


def sample(order: str, n: int) -> NDArray[np.int64]:
    """Lengths of passages, in an order of arrival."""
    lengths = np.random.default_rng(1).lognormal(4.5, 0.8, n).astype(np.int64).clip(3, 512)
    return {"longest first": np.sort(lengths)[::-1], "shortest first": np.sort(lengths), "any": lengths}[order]


orders = pytest.mark.parametrize("order", ["longest first", "shortest first", "any"])


@orders
@pytest.mark.parametrize("knee", [0, 700])
def test_batches_without_padding_are_full_in_whatever_order_rows_come(order: str, knee: int) -> None:
    costs = CostModel(fills_up=False, knee=knee)
    filled = [costs.of(batch) / 4096 for batch in turns(sample(order, 2000), 4096, costs)]
    assert min(filled[:-1]) > 0.75  # the longest rows alone leave room for no other of theirs
    assert np.mean(filled[:-1]) > 0.95


def least(lengths: NDArray[np.int64], budget: int, costs: CostModel) -> int:
    """What the best division of sorted rows into batches costs."""
    ordered = np.sort(lengths)
    best = np.zeros(len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        rows = np.arange(end, 0, -1)  # in a last batch that begins at 0, 1, …
        cost = rows * int(costs.of_rows(ordered[end - 1])) + costs.pass_tokens
        allowed = (rows * ordered[end - 1] <= budget) | (rows == 1)
        best[end] = np.where(allowed, best[:end] + cost, np.inf).min()
    return int(best[-1])


@orders
@pytest.mark.parametrize("pass_tokens", [10, 64, 1000])
def test_batches_with_padding_cost_little_more_than_the_best_division(order: str, pass_tokens: int) -> None:
    costs, lengths = CostModel(pass_tokens=pass_tokens), sample(order, 500)
    found = sum(costs.of(batch) + pass_tokens for batch in turns(lengths, 4096, costs))
    assert found < 1.08 * least(lengths, 4096, costs)


def test_rows_of_like_length_go_together() -> None:
    lengths = column([5, 500, 6, 480, 4, 510])
    assert sorted(PADDED.choose(lengths, 1024).tolist()) == [0, 2, 4]
    assert sorted(PADDED.choose(lengths[1:], 1024).tolist()) == [0, 4]  # 500 and 510 waste least
    assert PADDED.choose(column([5, 500]), 1024).tolist() == [0]  # both would fit; padding 5 to 500 is not worth it
    assert CostModel(fills_up=False).choose(column([5, 500]), 1024).tolist() == [1, 0]


def test_of_equal_rows_the_older_go_first() -> None:
    for costs in (PADDED, CostModel(fills_up=False)):
        assert sorted(costs.choose(column([10] * 9), 45).tolist()) == [0, 1, 2, 3]


@given(rows_of_tokens, rows_of_tokens, budgets, models)
def test_what_goes_beside_fits(lengths: list[int], batch: list[int], most: int, costs: CostModel) -> None:
    rows, going = column(lengths), column(batch)
    places = costs.beside(rows, going, most)
    assert len(set(places.tolist())) == len(places)
    if len(places):
        assert costs.of(np.concatenate([going, rows[places]])) <= most
    if costs.fills_up:
        assert (rows[places] <= going.max()).all()  # it makes the batch no wider


def test_beside_a_batch_without_padding_longer_rows_go_too() -> None:
    costs = CostModel(fills_up=False)
    assert costs.beside(column([50, 30, 10, 100]), column([10]), 100).tolist() == [0, 1, 2]
    assert PADDED.beside(column([50, 30, 10, 5]), column([10]), 30).tolist() == [2, 3]
