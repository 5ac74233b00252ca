from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from embedstream.consumer.encoders.encoder import Ids, differ
from embedstream.consumer.encoders.padded import EqualLengths

LENGTHS = np.array([3, 1, 5, 3, 1])
IDS = np.arange(1, 14)


class FeelsPadding:
    """Gives each token its id, and more of it by what its sequence was filled up with."""

    name = "felt"
    fills_up = True

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        self.shapes.append((len(lengths), int(lengths.max())))
        felt = np.repeat(lengths.max() - lengths, lengths)
        return torch.from_numpy(ids + felt).float().unsqueeze(1)


def test_rows_of_equal_length_run_together_and_come_back_in_their_places() -> None:
    encoder = FeelsPadding()
    hidden = EqualLengths(encoder)(IDS, LENGTHS)
    assert hidden[:, 0].tolist() == IDS.tolist()
    assert encoder.shapes == [(2, 1), (2, 3), (1, 5)]
    assert encoder(IDS, LENGTHS)[:, 0].tolist() != IDS.tolist()


@pytest.mark.parametrize(
    ("dtype", "by", "expected"),
    [
        (torch.float32, 0.0, False),
        (torch.float32, 1e-3, False),
        (torch.float32, 2e-3, True),
        (torch.bfloat16, 0.2, False),
        (torch.bfloat16, 1.0, True),
        (torch.float16, 0.05, False),
        (torch.float16, 0.2, True),
        (torch.float32, np.nan, True),
    ],
)
def test_what_differs_does_so_by_more_than_the_number_format_rounds(
    dtype: torch.dtype, by: float, expected: bool
) -> None:
    one = torch.tensor([[1.0, 0.5], [0.25, 0.125]], dtype=dtype)
    other = one.clone()
    other[1, 1] += by * 0.99
    assert differ(one, other) is expected
