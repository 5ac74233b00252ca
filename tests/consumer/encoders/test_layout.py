from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedstream.consumer.encoders.layout import Group, Layout


@pytest.mark.parametrize("lengths", [[4, 4, 2, 1], [1, 2, 2, 5], [3], [2, 2]])
def test_a_sorted_batch_keeps_its_order_and_is_not_copied(lengths: list[int]) -> None:
    layout, ids = Layout(np.array(lengths)), np.arange(sum(lengths))
    assert layout.lengths.tolist() == lengths
    assert layout.pack(ids) is ids
    hidden = torch.zeros(sum(lengths), 2)
    assert layout.unpack(hidden) is hidden


def test_groups_of_equal_length_follow_each_other_longest_first() -> None:
    layout = Layout(np.array([2, 3, 1, 3, 2, 2], np.uint32))
    assert layout.groups == (Group(0, 2, 3), Group(6, 3, 2), Group(12, 1, 1))
    assert [group.end for group in layout.groups] == [6, 12, 13]
    assert layout.pack(np.arange(13)).tolist() == [2, 3, 4, 6, 7, 8, 0, 1, 9, 10, 11, 12, 5]
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 0, 1, 0]
    assert layout.offsets.tolist() == [0, 3, 6, 8, 10, 12, 13]
    assert (len(layout), layout.total, layout.max_length) == (6, 13, 3)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([9, 7, 6, 3], [[9, 7, 6, 3]]),
        ([7, 7, 7, 3], [[7, 3]]),
        ([100, 60, 9, 7], [[100], [60], [9, 7]]),
        ([30, 20, 9, 7, 5, 1], [[30], [20, 9, 7, 5, 1]]),
        ([5] * 40, [[5]]),
        ([9] * 10 + [8] * 10, [[9], [8]]),
    ],
)
def test_a_few_short_sequences_are_one_run(lengths: list[int], runs: list[list[int]]) -> None:
    layout = Layout(np.array(lengths))
    assert [[group.length for group in run] for run in layout.runs] == runs
    assert tuple(group for run in layout.runs for group in run) == layout.groups


def test_kernels_get_offsets_once_for_a_device() -> None:
    layout = Layout(np.array([2, 5]))
    offsets = layout.cumulative(torch.device("cpu"))
    assert (offsets.dtype, offsets.tolist()) == (torch.int32, [0, 2, 7])
    assert layout.cumulative(torch.device("cpu")) is offsets


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_what_is_packed_comes_back_in_its_place(lengths: list[int]) -> None:
    layout = Layout(np.array(lengths))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    assert (layout.pack(places) == layout.positions).all()
    packed = layout.pack(owner)
    for group in layout.groups:
        rows = packed[group.start : group.end].reshape(group.rows, group.length)
        assert (rows == rows[:, :1]).all()
        assert len(set(rows[:, 0].tolist())) == group.rows
        assert (np.array(lengths)[rows[:, 0]] == group.length).all()
    assert layout.groups[-1].end == layout.total == sum(lengths)
    tokens = np.arange(layout.total)
    assert (layout.unpack(torch.from_numpy(layout.pack(tokens))).numpy() == tokens).all()
