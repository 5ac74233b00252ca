from __future__ import annotations

import numpy as np
import pytest
import torch

from embedstream.consumer.pooling import (
    cls_pool,
    cut_and_normalize,
    last_pool,
    max_pool,
    mean_pool,
    mean_sqrt_len_pool,
    pool,
    weighted_mean_pool,
)
from embedstream.shared.recipe import Pooling

HIDDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [7.0, 8.0], [9.0, 10.0], [11.0, 12.0]])
LENGTHS = torch.tensor([2, 3])


def test_cls() -> None:
    assert cls_pool(HIDDEN, LENGTHS).tolist() == [[1, 2], [7, 8]]


def test_mean() -> None:
    assert mean_pool(HIDDEN, LENGTHS).tolist() == [[2, 3], [9, 10]]


def test_last() -> None:
    assert last_pool(HIDDEN, LENGTHS).tolist() == [[3, 4], [11, 12]]


def test_all_tokens_in_order() -> None:
    assert pool((Pooling.ALL,), HIDDEN, LENGTHS).tolist() == [[1, 2], [3, 4], [7, 8], [9, 10], [11, 12]]


def test_max() -> None:
    assert max_pool(-HIDDEN, LENGTHS).tolist() == [[-1, -2], [-7, -8]]


def test_mean_over_the_root_of_the_length() -> None:
    expected = torch.tensor([[4, 6], [27, 30]]) / torch.tensor([[2.0], [3.0]]).sqrt()
    torch.testing.assert_close(mean_sqrt_len_pool(HIDDEN, LENGTHS), expected)


def test_later_tokens_weigh_more() -> None:
    expected = torch.tensor([[(1 + 2 * 3) / 3, (2 + 2 * 4) / 3], [(7 + 2 * 9 + 3 * 11) / 6, (8 + 2 * 10 + 3 * 12) / 6]])
    torch.testing.assert_close(weighted_mean_pool(HIDDEN, LENGTHS), expected)


def test_several_ways_stand_side_by_side_in_their_order() -> None:
    both = pool((Pooling.LAST, Pooling.CLS), HIDDEN, LENGTHS)
    assert both.tolist() == [[3, 4, 1, 2], [11, 12, 7, 8]]


@pytest.mark.parametrize("pooling", [way for way in Pooling if way is not Pooling.ALL])
def test_tokens_of_a_prompt_are_left_out(pooling: Pooling) -> None:
    kept = pool((pooling,), torch.cat([HIDDEN[:2], HIDDEN[3:]]), torch.tensor([2, 2]))
    if pooling is Pooling.WEIGHTED_MEAN:  # the others keep the weights of their places
        kept[1] = (HIDDEN[3] * 2 + HIDDEN[4] * 3) / 5
    torch.testing.assert_close(pool((pooling,), HIDDEN, LENGTHS, torch.tensor([0, 1])), kept)


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST, Pooling.MEAN_SQRT_LEN, Pooling.WEIGHTED_MEAN])
@pytest.mark.parametrize("beyond", [0, 2])
def test_a_row_of_nothing_but_its_prompt_is_zero(pooling: Pooling, beyond: int) -> None:
    assert pool((pooling,), HIDDEN, LENGTHS, LENGTHS + beyond).tolist() == [[0, 0], [0, 0]]


def test_a_row_of_nothing_but_its_prompt_has_a_first_token_and_no_largest() -> None:
    assert cls_pool(HIDDEN, LENGTHS, LENGTHS).tolist() == [[1, 2], [7, 8]]
    assert max_pool(HIDDEN, LENGTHS, torch.tensor([0, 3])).tolist() == [[3, 4], [-torch.inf, -torch.inf]]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_pool_by_name(pooling: Pooling) -> None:
    expected = {
        Pooling.CLS: cls_pool(HIDDEN, LENGTHS),
        Pooling.MEAN: mean_pool(HIDDEN, LENGTHS),
        Pooling.LAST: last_pool(HIDDEN, LENGTHS),
        Pooling.ALL: HIDDEN,
        Pooling.MAX: max_pool(HIDDEN, LENGTHS),
        Pooling.MEAN_SQRT_LEN: mean_sqrt_len_pool(HIDDEN, LENGTHS),
        Pooling.WEIGHTED_MEAN: weighted_mean_pool(HIDDEN, LENGTHS),
    }
    assert torch.equal(pool((pooling,), HIDDEN, LENGTHS), expected[pooling])


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_are_float32(pooling: Pooling, dtype: torch.dtype) -> None:
    assert pool((pooling,), HIDDEN.to(dtype), LENGTHS).dtype is torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("pooling", [way for way in Pooling if way is not Pooling.ALL])
def test_what_stands_in_a_neighbour_or_in_the_prompt_does_not_matter(pooling: Pooling, value: float) -> None:
    hidden, skip = HIDDEN.clone(), torch.tensor([0, 1])
    hidden[:3] = value
    expected = pool((pooling,), HIDDEN, LENGTHS, skip)[1]
    assert torch.equal(pool((pooling,), hidden, LENGTHS, skip)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_is_summed_in_float32(dtype: torch.dtype) -> None:
    hidden = torch.full((4096, 1), 33.0, dtype=dtype)  # the sum overflows float16 and is too coarse in bfloat16
    hidden[0, 0] = 1.0
    mean = mean_pool(hidden, torch.tensor([4096]))
    assert mean.item() == pytest.approx(33 - 32 / 4096, abs=1e-5)


def test_the_mean_of_a_long_text_is_exact() -> None:
    hidden = torch.from_numpy(np.random.default_rng(1).normal(size=(32_768, 8)).astype(np.float32))
    exact = hidden.double().mean(0)
    torch.testing.assert_close(mean_pool(hidden, torch.tensor([32_768]))[0].double(), exact, atol=1e-6, rtol=0)


def test_cut_then_normalize() -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0]])
    np.testing.assert_allclose(cut_and_normalize(vectors, 2, True), [[0.6, 0.8]], rtol=1e-6)
