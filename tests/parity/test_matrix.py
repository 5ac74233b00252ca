"""Vectors of a consumer equal those of sentence-transformers: every family of models, every way of pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from embedstream.consumer.model import Model
from embedstream.shared.keys import Keys
from embedstream.shared.models import locate
from embedstream.shared.recipe import Pooling
from embedstream.shared.recipe_files import read_recipe

from . import layout, served
from .edges import error_at_edges
from .families import FAMILIES, Family, batches_of
from .report import EACH_TOKEN, MODES, PROPERTY, SEVERAL, row
from .texts import TEXTS

TOLERANCE = 1e-5
BATCHES = {"bert": "packed", "packed": "packed", "equal lengths": "equal lengths"}
"""Of encoders that fill nothing up."""
TOGETHER = ("weightedmean", "cls", "max")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
async def test_matrix(
    family: Family, tmp_path: Path, redis_url: str, keys: Keys, record_property: Callable[[str, Any], None]
) -> None:
    path = layout.write(family, tmp_path)
    with structlog.testing.capture_logs() as logs:
        model, reference = Model.load(served.settings(path)), layout.read(family, path)
    warned = [entry["event"] for entry in logs if entry["log_level"] not in ("debug", "info")]
    assert warned == (["model.feels_padding"] if family.feels_padding else [])
    assert ("padded" if model.encoder.fills_up else BATCHES[model.encoder.name]) == batches_of(family), logs
    assert error_at_edges(model, reference) <= TOLERANCE
    lengths = model.tokenizer.encode(TEXTS, truncate_to=model.recipe.max_length).lengths
    assert lengths.max() == model.recipe.max_length == reference.max_seq_length
    assert len(set(lengths.tolist())) > len(TEXTS) / 2

    queued = await served.through_queue(model, TEXTS, redis_url, keys)

    def expected(modes: Sequence[str]) -> served.Vectors:
        reference[1] = layout.pooling(family, modes)
        return served.theirs(reference, TEXTS)

    def error(modes: Sequence[str], vectors: served.Vectors) -> float:
        layout.pooling(family, modes).save(str(path / "1_Pooling"))
        recipe = read_recipe(locate(str(path), None), served.settings(path))
        return served.error(served.ours(model, TEXTS, recipe.pooling), vectors)

    # One pass for all modes, which sentence-transformers puts side by side: a pass for each would take minutes.
    parts = zip(*(np.split(vector, len(MODES)) for vector in expected(MODES)), strict=True)
    by_mode = dict(zip(MODES, parts, strict=True))
    errors = {mode: error((mode,), vectors) for mode, vectors in by_mode.items()}
    assert served.error(queued, by_mode["mean"]) <= TOLERANCE
    errors[SEVERAL] = error(TOGETHER, expected(TOGETHER))
    each_token = served.theirs(reference, TEXTS, "token_embeddings")
    errors[EACH_TOKEN] = served.error(served.ours(model, TEXTS, (Pooling.ALL,)), each_token)
    record_property(PROPERTY, row(family.name, family.model_type, batches_of(family), errors))
    assert max(errors.values()) <= TOLERANCE, errors
