"""Prompts from the producer to the vector: as ids of a known model, and as texts of one that nobody has announced."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.consumer.embedder import Embedder
from embedstream.consumer.model import Model
from embedstream.producer import Options, Producer
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.settings import Dtype, Settings

from .made import consumer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports, none of which is ours
    from sentence_transformers import SentenceTransformer

pytestmark = pytest.mark.integration

TEXTS = ["the queue", "a, b and c", "queue", "nothing of the kind 0 1 2 3", "the", "abc " * 40]
PROMPTS = {"query": "the queue? ", "document": "some text, the text: ", "sts": "the", "none": ""}
ASKED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("embed", {}, "encode", {}),
    ("embed", {"prompt_name": ""}, "encode", {"prompt": ""}),
    *[("embed", {"prompt_name": name}, "encode", {"prompt_name": name}) for name in PROMPTS],
    ("embed_query", {}, "encode_query", {}),
    ("embed_document", {}, "encode_document", {}),
]
"""Calls of the producer, and what they are to equal."""


def with_prompts(path: Path, *, include_prompt: bool) -> Path:
    """A model's folder, with prompts written into its files."""
    settings = {"prompts": PROMPTS, "default_prompt_name": "sts", "similarity_fn_name": "cosine"}
    (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    pooling = path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"include_prompt": include_prompt}))
    return path


def theirs(model: SentenceTransformer, method: str, options: dict[str, Any]) -> NDArray[np.float32]:
    """What sentence-transformers makes of each text by itself."""
    encode = getattr(model, method)
    return np.stack([np.asarray(encode(text, show_progress_bar=False, **options)) for text in TEXTS])


def error(ours: NDArray[Any], reference: NDArray[Any]) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / max(1.0, np.abs(reference).max()))


@pytest.mark.parametrize(
    ("family", "pooling", "include_prompt"),
    [
        ("tiny_bert", "mean", False),
        ("tiny_bert", "weightedmean", False),
        ("tiny_bert", "cls", False),
        ("tiny_bert", "max", True),
        ("tiny_decoder", "lasttoken", True),
        ("tiny_decoder", "mean", False),
    ],
)
async def test_as_sentence_transformers_with_the_same_prompt(
    redis_url: str,
    prefix: str,
    keys: Keys,
    request: pytest.FixtureRequest,
    family: str,
    pooling: str,
    include_prompt: bool,
) -> None:
    make: Callable[..., Path] = request.getfixturevalue(family)
    path = with_prompts(make(pooling, normalize=False), include_prompt=include_prompt)
    served = Settings(model=str(path), served_model_name=("m",), dtype=Dtype.FLOAT32, device="cpu", threads=1)
    model = await asyncio.to_thread(Model.load, served)
    reference = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    expected = [theirs(reference, method, options) for _, _, method, options in ASKED]
    settings = Settings(redis_url=redis_url, key_prefix=prefix, scale_from_zero_s=30)
    async with Producer(settings=settings, model="m") as producer:

        def ask() -> list[Any]:
            calls = [(getattr(producer, call), options) for call, options, *_ in ASKED]
            return [asyncio.ensure_future(call(TEXTS, long_inputs="truncate", **options)) for call, options in calls]

        as_text = ask()
        async with asyncio.timeout(20):
            while await producer.redis.xlen(keys.lane(Lane.INTERACTIVE)) < len(ASKED):
                await asyncio.sleep(0.01)
        async with consumer(redis_url, keys, model.card.tokenizer, Embedder(model), model=model.card):
            first = await asyncio.gather(*as_text)
            assert (await producer.prepare(["a"], Options())).card is not None  # known by now: ids from here on
            for made in (first, await asyncio.gather(*ask())):
                errors = [error(ours, reference) for ours, reference in zip(made, expected, strict=True)]
                assert [asked for asked, error in zip(ASKED, errors, strict=True) if error > 1e-5] == []
    assert error(expected[2], expected[3]) > 1e-3  # else the prompts would have changed nothing
