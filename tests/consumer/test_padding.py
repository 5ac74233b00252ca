from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from embedstream.consumer.padding import Ids, feels_padding, without_padding

LENGTHS = np.array([3, 1, 5, 3, 1])
IDS = np.arange(1, 14)


class Forward:
    """Gives each token its id, and more of it by what follows in the batch."""

    def __init__(self, felt: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        self.felt = felt
        self.dtype = dtype
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, ids: Ids, lengths: Ids) -> tuple[Tensor, Tensor]:
        mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths).unsqueeze(1)
        self.shapes.append((mask.shape[0], mask.shape[1]))
        hidden = torch.zeros(mask.shape, dtype=self.dtype)
        hidden[mask] = torch.from_numpy(ids).to(self.dtype)
        hidden += self.felt * (~mask).sum(1, keepdim=True) * mask
        return hidden.unsqueeze(-1), mask.long()


def test_rows_of_equal_length_run_together_and_come_back_in_their_places() -> None:
    plain, padded = Forward(), Forward(felt=1)
    expected, mask = plain(IDS, LENGTHS)
    hidden, same = without_padding(padded, IDS, LENGTHS)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(same, mask)
    assert padded.shapes == [(2, 1), (2, 3), (1, 5)]


@pytest.mark.parametrize(
    ("dtype", "felt", "expected"),
    [
        (torch.float32, 0.0, False),
        (torch.float32, 1e-3, False),
        (torch.float32, 2e-3, True),
        (torch.bfloat16, 0.2, False),
        (torch.bfloat16, 1.0, True),
        (torch.float16, 0.05, False),
        (torch.float16, 0.2, True),
    ],
)
def test_what_is_felt_is_more_than_the_number_format_rounds(dtype: torch.dtype, felt: float, expected: bool) -> None:
    forward = Forward(felt, dtype)
    filled, _ = forward(IDS[:8], np.array([3, 5]))
    assert feels_padding(forward, IDS[:3], filled[0, :3]) is expected
