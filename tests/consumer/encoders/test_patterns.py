from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks

from embedstream.consumer.encoders.attention import Pattern
from embedstream.consumer.encoders.patterns import CannotPackError, Patterns, _read

LENGTH = 1500


def both_ways(window: int) -> Callable[..., Any]:
    return masks.sliding_window_bidirectional_mask_function(window)


def beside(_: Tensor, __: Tensor, query: Tensor, key: Tensor, *, behind: int) -> Tensor:
    return key - query <= behind


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (masks.bidirectional_mask_function, Pattern()),
        (masks.causal_mask_function, Pattern(right=0)),
        (masks.sliding_window_causal_mask_function(8), Pattern(left=7, right=0)),
        (masks.sliding_window_causal_mask_function(1300), Pattern(left=1299, right=0)),
        (masks.sliding_window_causal_mask_function(4096), Pattern(right=0)),
        (both_ways(8), Pattern(left=8, right=8)),
        (masks.or_masks(masks.causal_mask_function, lambda *_: torch.tensor(True)), Pattern()),
        (partial(beside, behind=3), Pattern(right=3)),
    ],
)
def test_what_transformers_masks_is_a_window(function: Callable[..., Any], expected: Pattern) -> None:
    assert Patterns().of(function, LENGTH) == expected


def test_a_window_longer_than_what_was_looked_at_shows_in_longer_sequences() -> None:
    patterns = Patterns()
    assert patterns.of(masks.sliding_window_causal_mask_function(2000), 100) == Pattern(right=0)
    assert patterns.of(masks.sliding_window_causal_mask_function(2000), 3000) == Pattern(left=1999, right=0)


def test_functions_that_are_made_alike_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Callable[..., Any]] = []

    def read(function: Callable[..., Any], length: int) -> Pattern:
        looked_at.append(function)
        return _read(function, length)

    monkeypatch.setattr("embedstream.consumer.encoders.patterns._read", read)
    patterns = Patterns()
    found = [patterns.of(both_ways(window), length) for window, length in ((3, 9), (3, 100), (5, 9), (3, 2000), (3, 9))]
    assert found == [Pattern(3, 3), Pattern(3, 3), Pattern(5, 5), Pattern(3, 3), Pattern(3, 3)]
    assert len(looked_at) == 3


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (masks.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)), "hangs on a Tensor"),
        (masks.padding_mask_function(torch.ones(1, LENGTH, dtype=torch.bool)), "hangs on a Tensor"),
        (lambda b, h, query, key: key // 8 == query // 8, "not a window"),
        (lambda b, h, query, key: (key - query) % 2 == 0, "not a window"),
        (lambda b, h, query, key: key < query, "hides all tokens"),
        (lambda b, h, query, key: (key <= query) | (key < 4), "not a window"),
    ],
)
def test_other_masks_are_refused(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(CannotPackError, match=reason):
        Patterns().of(function, LENGTH)
