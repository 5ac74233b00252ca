from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedstream.consumer.direct import Direct
from embedstream.consumer.model import Model
from embedstream.shared.errors import InvalidInput
from embedstream.shared.options import VectorOptions
from embedstream.shared.settings import Dtype, Settings

TEXTS = ["the queue", "", "x" * 60, *(f"text {number}" for number in range(70))]


@pytest.fixture
def model(tiny_bert: Callable[..., Path]) -> Model:
    return Model.load(Settings(model=str(tiny_bert()), dtype=Dtype.FLOAT32, device="cpu", threads=1))


def test_alone_and_together(model: Model) -> None:
    direct = Direct(model, 512)
    alone, together = direct.embed(TEXTS, alone=True), direct.embed(TEXTS)
    for one, other in zip(alone.vectors, together.vectors, strict=True):
        assert one is not None
        assert other is not None
        assert one.shape == (32,)
        np.testing.assert_allclose(one, other, atol=1e-5)
    tokens = model.tokenizer.encode(TEXTS, truncate_to=48)
    for answer in (alone, together):
        np.testing.assert_array_equal(np.concatenate(answer.ids), tokens.ids)
        assert [len(ids) for ids in answer.ids] == tokens.lengths.tolist()
    assert not alone.reasons


def test_vectors_of_tokens(model: Model) -> None:
    answer = Direct(model, 512).embed(TEXTS, options=VectorOptions(per_token=True, normalize=False))
    for ids, matrix in zip(answer.ids, answer.vectors, strict=True):
        assert matrix is not None
        assert matrix.shape == (len(ids), 32)


def test_a_text_that_fails_has_no_vector(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    bare = Model.load(Settings(model=str(folder), dtype=Dtype.FLOAT32, device="cpu", threads=1))
    answer = Direct(bare, 512).embed(["a", "", "b"])
    assert [vector is None for vector in answer.vectors] == [False, True, False]
    assert answer.reasons == {1: "The decoder prompt cannot be empty."}


def test_what_the_model_does_not_serve_is_said(model: Model) -> None:
    with pytest.raises(InvalidInput, match="`nothing`"):
        Direct(model, 512).embed(["a"], adapter="nothing")
