from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embedstream.consumer.encoders.bundles import MOST_TOKENS, Bundle, attend_bundle, bundles_of

HEADS, DIM, VALUE_DIM, SCALE = 3, 4, 5, 0.5


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def bundled(lengths: list[int], start: int = 0) -> list[Bundle]:
    found = bundles_of(np.array(lengths), start, heads=HEADS, dtype=torch.float32)
    return sorted(found, key=lambda bundle: bundle.start)


def made(total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key = torch.randn(total, HEADS, DIM), torch.randn(total, HEADS, DIM)
    return query, key, torch.randn(total, HEADS, VALUE_DIM), torch.full((total, HEADS, VALUE_DIM), torch.nan)


def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of one sequence, by the book, in float64."""
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * SCALE
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double()).float()


@given(st.lists(st.integers(1, 700), min_size=1, max_size=80), st.booleans(), st.integers(0, 50))
def test_each_sequence_is_in_one_bundle(lengths: list[int], rising: bool, start: int) -> None:
    lengths.sort(reverse=not rising)
    place, row = start, 0
    for bundle in bundled(lengths, start):
        own = lengths[row : row + bundle.rows]
        assert (bundle.start, bundle.end) == (place, place + sum(own))
        assert bundle.rows.bit_count() == 1  # few sizes
        assert bundle.rows == 1 or bundle.rows * max(own) <= MOST_TOKENS
        assert sum(max(own) ** 2 - length**2 for length in own) <= 8192  # that are computed and hidden
        if bundle.filling is None:
            assert {*own} == {bundle.length}
        else:
            assert len({*own}) > 1
            assert max(own) <= bundle.length < max(own) + 8
            assert bundle.length % 8 == 0
        place, row = bundle.end, row + bundle.rows
    assert row == len(lengths)


@pytest.mark.parametrize(
    ("lengths", "expected_rows"),
    [
        ([100] * 11 + [90], [(4, 100), (4, 100), (4, 104)]),  # 1,900 scores in place of two more calls
        ([90] + [100] * 11, [(4, 104), (4, 100), (4, 100)]),  # from the long end
        ([250, 210, 209, 208], [(1, 250), (2, 216), (1, 208)]),  # 18,400 scores are too many
        ([600, 599], [(1, 600), (1, 599)]),
        ([9, 9, 9, 8, 8, 7, 7, 7, 6], [(8, 16), (1, 6)]),
    ],
)
def test_what_is_worth_filling_up(lengths: list[int], expected_rows: list[tuple[int, int]]) -> None:
    assert [(bundle.rows, bundle.length) for bundle in bundled(lengths)] == expected_rows


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_each_token_attends_to_all_of_its_own_sequence(joined: bool, rising: bool) -> None:
    lengths = sorted([64] * 8 + [40, 39, 39, 38, 33, 33, 33, 17, 16, 15, 15, 2, 1, 1], reverse=not rising)
    query, key, value, output = made(3 + sum(lengths))
    if joined:  # views of one matrix, as a projection of query, key and value gives them
        query, key, value = torch.split(torch.cat([query, key, value], dim=-1), [DIM, DIM, VALUE_DIM], dim=-1)
    some = bundled(lengths, start=3)
    assert len({bundle.filling is None for bundle in some}) == 2
    for bundle in some:
        attend_bundle(query, key, value, output, bundle, SCALE, softmax)
    parts = [torch.split(part[3:], lengths) for part in (query, key, value)]
    wanted = torch.cat([expected(*sequence) for sequence in zip(*parts, strict=True)])
    torch.testing.assert_close(output[3:], wanted, atol=3e-6, rtol=0)
    assert output[:3].isnan().all()  # of others


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_one_sequence_never_reach_another(dtype: torch.dtype, bad: float) -> None:
    lengths = [12, 11, 10, 9]
    query, key, value, output = (part.to(dtype) for part in made(sum(lengths)))
    (bundle,) = bundles_of(np.array(lengths), 0, heads=HEADS, dtype=dtype)
    attend_bundle(query, key, value, output, bundle, SCALE, softmax)
    for part in (query, key, value):
        part[12:23] = bad
    spoilt = torch.empty_like(output)
    attend_bundle(query, key, value, spoilt, bundle, SCALE, softmax)
    assert spoilt[12:23].isnan().all()
    assert torch.equal(torch.cat([spoilt[:12], spoilt[23:]]), torch.cat([output[:12], output[23:]]))
