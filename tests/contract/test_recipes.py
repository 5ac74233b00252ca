"""Vectors of models with other recipes, against sentence-transformers; tests/parity has the families of models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from .case import covers
from .models import OTHER_PROMPTS, PROMPTS, TASKS
from .servers import Servers

pytestmark = pytest.mark.integration

TEXTS = ["the queue", "How are you", "", "the " * 30]


@pytest.fixture(scope="module")
def reference(servers: Servers) -> Callable[[str], Any]:
    """The model of a server as sentence-transformers loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports, not ours
        from sentence_transformers import SentenceTransformer

    def load(name: str) -> Any:
        servers[name]  # its files are there
        return SentenceTransformer(str(servers.folder / name), device="cpu")

    return load


def assert_equal(vectors: Any, expected: Any) -> None:
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5 * max(1, abs(expected).max()))


@covers("E-POOL-02", "E-POOL-04")
@pytest.mark.parametrize("name", ["tiny", "raw", "any", "headed"])
def test_pooling_and_what_follows(servers: Servers, reference: Callable[[str], Any], name: str) -> None:
    model = reference(name)
    assert_equal(servers[name].vectors(TEXTS), model.encode(TEXTS))
    assert_equal(servers[name].vectors(TEXTS, use_activation=True), model.encode(TEXTS, normalize_embeddings=True))


@covers("E-POOL-04", "E-DIM-06")
def test_a_shorter_vector_of_a_model_with_a_head(servers: Servers, reference: Callable[[str], Any]) -> None:
    expected = reference("headed").encode(TEXTS, truncate_dim=4, normalize_embeddings=True)
    assert_equal(servers["headed"].vectors(TEXTS, dimensions=4), expected)


@covers("E-PTS-09")
def test_token_vectors_of_a_model_with_a_head(servers: Servers, reference: Callable[[str], Any]) -> None:
    reply = servers["headed"].post({"input": TEXTS, "task": "token_embed", "normalize": False}, "/pooling")
    for item, expected in zip(
        reply.json["data"], reference("headed").encode(TEXTS, output_value="token_embeddings"), strict=True
    ):
        assert_equal(item["data"], expected.numpy())


@covers("E-INP-12", "E-PROMPT-08", "E-PROMPT-09")
@pytest.mark.parametrize(("name", "prompts"), [("prompted", PROMPTS), ("headed", OTHER_PROMPTS)])
def test_prompts(servers: Servers, reference: Callable[[str], Any], name: str, prompts: dict[str, str]) -> None:
    model, api = reference(name), servers[name]
    assert_equal(api.vectors(TEXTS), model.encode(TEXTS))
    assert_equal(api.vectors(TEXTS, prompt_name=""), model.encode(TEXTS, prompt=""))
    for prompt in prompts:
        assert_equal(api.vectors(TEXTS, prompt_name=prompt), model.encode(TEXTS, prompt_name=prompt))
    assert_equal(api.vectors(TEXTS, input_type="query"), model.encode_query(TEXTS))
    assert_equal(api.vectors(TEXTS, input_type="document"), _of_documents(model, prompts))


def _of_documents(model: Any, prompts: dict[str, str]) -> Any:
    """sentence-transformers 6.2 takes `passage` only by its name: it makes an empty `document` of its own."""
    return model.encode_document(TEXTS, prompt_name=None if "document" in prompts else "passage")


@covers("E-TASK-01")
def test_adapters_at_the_same_time(servers: Servers, reference: Callable[[str], Any]) -> None:
    api = servers["tasked"]
    expected: dict[str | None, Any] = {None: reference("tasked").encode(TEXTS, prompt="")}
    for name in TASKS:
        model = reference("tasked")
        model.load_adapter(str(servers.folder / "tasked" / name))
        expected[name] = model.encode(TEXTS, prompt="")
    tasks = [None, *TASKS] * 8

    def ask(task: str | None) -> Any:
        return api.post({"input": TEXTS, "task": task}).vectors

    with ThreadPoolExecutor(8) as pool:
        for task, vectors in zip(tasks, pool.map(ask, tasks), strict=True):
            assert_equal(vectors, expected[task])
