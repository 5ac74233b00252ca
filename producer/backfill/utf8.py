"""Which strings are UTF-8. Arrow believes what a file says, and its readers may crash on what is not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def decoded(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Turn bytes into strings.

    Args:
        column: (rows,) binary or large binary.
        kind: string or large string.

    Returns:
        (rows,) strings, null where the bytes are no UTF-8, and the rows where that is.
    """
    bad: list[int] = []
    _find(column, kind, 0, bad)
    if bad:
        keep = np.ones(len(column), np.bool_)
        keep[bad] = False
        column = pc.if_else(pa.array(keep), column, pa.scalar(None, column.type))
    return column.cast(kind), bad


def _find(column: pa.Array, kind: pa.DataType, first: int, bad: list[int]) -> None:
    """Halve what is not UTF-8 until single rows are left: nearly always all of it is."""
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        if len(column) == 1:
            bad.append(first)
            return
        half = len(column) // 2
        _find(column.slice(0, half), kind, first, bad)
        _find(column.slice(half), kind, first + half, bad)
