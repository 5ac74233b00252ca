from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from embedstream.consumer import embedder
from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.embedder import Embedder, _cast, _to_numpy
from embedstream.consumer.model import Model
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.settings import Dtype, Settings

from .made import batch_of, entry

VALUES = [0.0, 1.0, -0.3, 1e-4, 447.0, 448.0, 464.0, 464.1, -464.0, -465.0, 500.0, 1e6, -1e6, 57344.0, 65504.0, 1e38]


@pytest.mark.parametrize("dtype", list(VectorType))
def test_a_cast_is_that_of_ml_dtypes(dtype: VectorType) -> None:
    """Callers cast the means of long inputs by numpy: an input must not show who cast it."""
    vectors = np.array([VALUES], np.float32)
    with np.errstate(over="ignore"):
        expected = vectors.astype(dtype.numpy).astype(np.float32)
    got = _to_numpy(_cast(torch.from_numpy(vectors), dtype), dtype)
    assert got.dtype == dtype.numpy
    np.testing.assert_array_equal(got.astype(np.float32), expected)


def test_what_is_too_large_for_e4m3_is_not_a_number() -> None:
    got = _to_numpy(_cast(torch.tensor([[465.0, -1e6, 448.0]]), VectorType.FP8_E4M3), VectorType.FP8_E4M3)
    assert got.dtype == ml_dtypes.float8_e4m3fn
    assert [math.isnan(float(value)) for value in got[0]] == [True, True, False]


_BAD = 9


@pytest.fixture
def spoiled(tiny_bert: Callable[..., Path]) -> Model:
    """A model that has no number for the token `_BAD`."""
    settings = Settings(model=str(tiny_bert()), dtype=Dtype.FLOAT32, device="cpu", threads=1, keep_measurements=False)
    model = Model.load(settings)
    with torch.no_grad():
        weights: Any = model._module.get_submodule("embeddings.word_embeddings")
        weights.weight[_BAD] = math.inf
    return model


def batch(lengths: list[int], bad: list[int], options: VectorOptions) -> MicroBatch:
    """One job, whose first tokens are `_BAD` in some rows."""
    made = batch_of(entry(lengths, options=options))
    ids = np.full(made.n_tokens, 5, np.uint32)
    starts = np.cumsum(made.lengths) - made.lengths
    ids[starts[np.isin(made.row, bad)]] = _BAD
    return replace(made, ids=ids)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [VectorType.FLOAT32, VectorType.BFLOAT16])
def test_what_is_not_finite_is_so_alone(spoiled: Model, per_token: bool, dtype: VectorType) -> None:
    """Short rows of several lengths share a call of attention, in which zero times infinity is no number."""
    some = batch([8, 6, 5, 3], [1], VectorOptions(dtype=dtype, per_token=per_token))
    hidden = spoiled.forward(some.ids, some.lengths, "")
    assert not hidden[:8].isfinite().all()  # of the first row, which is a good one
    (group,) = Embedder(spoiled).embed(some).groups
    assert some.row.tolist() == [0, 1, 2, 3]
    assert group.finite.tolist() == [True, False, True, True]
    bounds = [0, 1, 2, 3, 4] if group.bounds is None else group.bounds.tolist()
    for place in (0, 2, 3):
        (alone,) = Embedder(spoiled).embed(some.alone(place)).groups
        np.testing.assert_array_equal(group.vectors[bounds[place] : bounds[place + 1]], alone.vectors)
        assert np.isfinite(alone.vectors.astype(np.float32)).all()


def test_only_few_rows_are_computed_once_more(spoiled: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "_MOST_AGAIN", 2)
    rows: list[list[int]] = []
    forward = spoiled.forward

    def watched(ids: Any, lengths: Any, adapter: str) -> torch.Tensor:
        rows.append(lengths.tolist())
        return forward(ids, lengths, adapter)

    monkeypatch.setattr(spoiled, "forward", watched)
    lengths = [9, 8, 5, 4]
    embedded = Embedder(spoiled).embed(batch(lengths, [0, 1, 2, 3], VectorOptions()))
    assert rows == [lengths, [9], [8]]
    assert not embedded.groups[0].finite.any()
    rows.clear()
    Embedder(spoiled).embed(batch([5], [0], VectorOptions()))
    Embedder(spoiled).embed(batch([5, 4], [], VectorOptions()))
    assert rows == [[5], [5, 4]]
