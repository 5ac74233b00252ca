"""What docs/models.md promises of half formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.consumer.agreement import HALF_COSINE, agreement
from embedstream.consumer.direct import Direct
from embedstream.consumer.model import Model
from embedstream.consumer.probe_texts import SHORT
from embedstream.shared.settings import Dtype, Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TEXTS = [*SHORT.values()][::-3]  # among them the empty one, which has the least cosine
BOUNDS = {Dtype.BFLOAT16: HALF_COSINE, Dtype.FLOAT16: 0.99999}


def vectors(model: Model, *, alone: bool = False) -> Sequence[NDArray[Any]]:
    found = Direct(model, 4096).embed(TEXTS, alone=alone).vectors
    return [vector for vector in found if vector is not None]


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_the_published_bound(minilm: Model, dtype: Dtype) -> None:
    # A short limit spares the long warm-up, which takes seconds in a format that this CPU has no instructions for.
    half = Model.load(Settings(model="all-MiniLM-L6-v2", dtype=dtype, device="cpu", threads=1, max_model_len=64))
    exact, together, alone = vectors(minilm), vectors(half), vectors(half, alone=True)
    assert len(exact) == len(together) == len(alone) == len(TEXTS)
    assert all(vector.dtype == np.float32 for vector in together)
    assert BOUNDS[dtype] <= agreement(together, exact).cosine < 1
    assert agreement(together, alone).cosine >= BOUNDS[dtype]


def test_the_page_publishes_these_bounds() -> None:
    text = " ".join(PAGE.read_text().split())
    (promised,) = re.findall(r"is at least (0\.9+) in bfloat16, and (0\.9+) in float16", text)
    assert tuple(map(float, promised)) == tuple(BOUNDS.values())
