from __future__ import annotations

import numpy as np
import pytest
import torch

from embedstream.consumer.pooling import (
    all_tokens,
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

HIDDEN = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_cls() -> None:
    assert cls_pool(HIDDEN, MASK).tolist() == [[1, 2], [7, 8]]


def test_mean_leaves_padding_out() -> None:
    assert mean_pool(HIDDEN, MASK).tolist() == [[2, 3], [9, 10]]


def test_last_is_the_last_real_token() -> None:
    assert last_pool(HIDDEN, MASK).tolist() == [[3, 4], [11, 12]]


def test_all_tokens_in_order() -> None:
    assert all_tokens(HIDDEN, MASK).tolist() == [[1, 2], [3, 4], [7, 8], [9, 10], [11, 12]]


def test_max_leaves_padding_out() -> None:
    assert max_pool(-HIDDEN, MASK).tolist() == [[-1, -2], [-7, -8]]


def test_mean_over_the_root_of_the_length() -> None:
    expected = torch.tensor([[4, 6], [27, 30]]) / torch.tensor([[2.0], [3.0]]).sqrt()
    torch.testing.assert_close(mean_sqrt_len_pool(HIDDEN, MASK), expected)


def test_later_tokens_weigh_more() -> None:
    expected = torch.tensor([[(1 + 2 * 3) / 3, (2 + 2 * 4) / 3], [(7 + 2 * 9 + 3 * 11) / 6, (8 + 2 * 10 + 3 * 12) / 6]])
    torch.testing.assert_close(weighted_mean_pool(HIDDEN, MASK), expected)


def test_several_ways_stand_side_by_side_in_their_order() -> None:
    both = pool((Pooling.LAST, Pooling.CLS), HIDDEN, MASK)
    assert both.tolist() == [[3, 4, 1, 2], [11, 12, 7, 8]]


@pytest.mark.parametrize("pooling", [way for way in Pooling if way is not Pooling.ALL])
def test_tokens_of_a_prompt_are_left_out(pooling: Pooling) -> None:
    kept = pool((pooling,), HIDDEN[1:, 1:], MASK[1:, 1:])
    if pooling is Pooling.WEIGHTED_MEAN:  # the others keep the weights of their places
        kept = (HIDDEN[1:, 1] * 2 + HIDDEN[1:, 2] * 3) / 5
    torch.testing.assert_close(pool((pooling,), HIDDEN[1:], MASK[1:], torch.tensor([1])), kept)


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST, Pooling.MEAN_SQRT_LEN, Pooling.WEIGHTED_MEAN])
def test_a_row_of_nothing_but_its_prompt_is_zero(pooling: Pooling) -> None:
    assert pool((pooling,), HIDDEN, MASK, torch.tensor([2, 3])).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_pool_by_name(pooling: Pooling) -> None:
    expected = {
        Pooling.CLS: cls_pool(HIDDEN, MASK),
        Pooling.MEAN: mean_pool(HIDDEN, MASK),
        Pooling.LAST: last_pool(HIDDEN, MASK),
        Pooling.ALL: all_tokens(HIDDEN, MASK),
        Pooling.MAX: max_pool(HIDDEN, MASK),
        Pooling.MEAN_SQRT_LEN: mean_sqrt_len_pool(HIDDEN, MASK),
        Pooling.WEIGHTED_MEAN: weighted_mean_pool(HIDDEN, MASK),
    }
    assert torch.equal(pool((pooling,), HIDDEN, MASK), expected[pooling])


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_are_float32(pooling: Pooling, dtype: torch.dtype) -> None:
    assert pool((pooling,), HIDDEN.to(dtype), MASK).dtype is torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("pooling", list(Pooling))
def test_what_stands_in_the_padding_does_not_matter(pooling: Pooling, value: float) -> None:
    hidden = HIDDEN.clone()
    hidden[0, 2] = value
    assert torch.equal(pool((pooling,), hidden, MASK), pool((pooling,), HIDDEN, MASK))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_is_summed_in_float32(dtype: torch.dtype) -> None:
    hidden = torch.full((1, 4096, 1), 33.0, dtype=dtype)  # the sum overflows float16 and is too coarse in bfloat16
    hidden[0, 0, 0] = 1.0
    mean = mean_pool(hidden, torch.ones(1, 4096))
    assert mean.item() == pytest.approx(33 - 32 / 4096, abs=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(kind: torch.dtype) -> None:
    for pooling in Pooling:
        assert torch.equal(pool((pooling,), HIDDEN, MASK.to(kind)), pool((pooling,), HIDDEN, MASK))


def test_a_row_without_tokens_has_a_zero_mean() -> None:
    assert mean_pool(HIDDEN, torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]


def test_cut_then_normalize() -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0]])
    np.testing.assert_allclose(cut_and_normalize(vectors, 2, True), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(cut_and_normalize(vectors, None, True), np.array([[3, 4, 12]]) / 13, rtol=1e-6)
    assert cut_and_normalize(vectors, 2, False).tolist() == [[3, 4]]
    assert cut_and_normalize(vectors, None, False).tolist() == [[3, 4, 12]]


def test_a_zero_vector_stays_zero() -> None:
    assert cut_and_normalize(torch.tensor([[0.0, 0.0, 1.0]]), 2, True).tolist() == [[0, 0]]
