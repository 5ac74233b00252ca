"""Blocks of a part become windows: all kept rows, in order, bounded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from embedstream.producer.backfill.blocks import Block, Window
from embedstream.producer.backfill.windows import FIRST_ROWS, Windows


def block(first: int, n_rows: int, chars: int = 10) -> Block:
    rows = np.arange(first, first + n_rows)
    texts = pa.array([f"{row:0{chars}}" for row in rows], pa.string())
    carried = pa.RecordBatch.from_arrays([pa.array(rows)], ["id"])
    return Block("f", rows, texts, carried, n_rows + 1)


def ids(windows: Sequence[Window]) -> list[int]:
    return [int(text[-20:]) for window in windows for text in window.texts.to_pylist()]


def test_they_grow_from_a_small_one_and_hold_every_row_in_order() -> None:
    windows = list(Windows(1 << 30).of([block(0, 5000), block(5000, 3000), block(8000, 9000)]))
    assert ids(windows) == list(range(17_000))
    sizes = [window.n_rows for window in windows]
    assert sizes[0] <= FIRST_ROWS
    assert all(later <= 2 * FIRST_ROWS * 2**place for place, later in enumerate(sizes[1:]))
    assert len(sizes) < 8


def test_later_parts_go_on_with_large_ones() -> None:
    windows = Windows(1 << 30)
    list(windows.of([block(0, 60_000)]))
    assert len(list(windows.of([block(0, 8000), block(8000, 8000)]))) == 1


def test_bytes_bound_them_also_within_a_block() -> None:
    windows = list(Windows(20_000).of([block(0, 500, chars=100), block(500, 1, chars=50_000), block(501, 10)]))
    assert ids(windows) == list(range(511))
    for window in windows:
        assert sum(each.n_bytes for each in window.blocks) <= 22_000 or window.n_rows == 1


def test_blocks_without_rows_make_no_window() -> None:
    assert list(Windows(100).of([block(0, 0), block(0, 0)])) == []


def test_carried_columns_and_rows_go_with_the_texts() -> None:
    for window in Windows(3000).of([block(7, 300)]):
        for piece in window.blocks:
            assert piece.carried.column("id").to_pylist() == piece.rows.tolist()
            assert [int(text) for text in piece.texts.to_pylist()] == piece.rows.tolist()
