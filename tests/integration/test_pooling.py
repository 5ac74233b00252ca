"""Vectors of tokens, and the tokens themselves, are those of the model's own libraries, through everything."""

from __future__ import annotations

import json
import warnings
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.shared.models import locate

pytestmark = pytest.mark.integration

TEXTS = ["Hello, world!", "", "Tokenisation splits uncommon words, naïve ones too.", "queue " * 100, "🙂 東京"]


def post(serving: Any, path: str, **body: Any) -> httpx2.Response:
    response = httpx2.post(f"{serving.url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response


@pytest.fixture(scope="module")
def sentence_transformer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports, not ours
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(locate("all-MiniLM-L6-v2").path), device="cpu")


@pytest.fixture(scope="module")
def matrices(sentence_transformer: Any) -> list[NDArray[np.float32]]:
    """For each text (tokens, dim), scaled to unit length."""
    found = sentence_transformer.encode(TEXTS, output_value="token_embeddings")
    rows = [np.asarray(matrix, np.float32) for matrix in found]
    return [matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in rows]


def test_vectors_of_tokens(serving: Any, matrices: list[NDArray[np.float32]]) -> None:
    answer = post(serving, "/pooling", input=TEXTS, task="token_embed").json()
    for item, matrix in zip(answer["data"], matrices, strict=True):
        np.testing.assert_allclose(np.array(item["data"], np.float32), matrix, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, matrices))


def test_vectors_of_tokens_as_bytes(serving: Any, matrices: list[NDArray[np.float32]]) -> None:
    response = post(serving, "/pooling", input=TEXTS, task="token_embed", encoding_format="bytes")
    for entry, matrix in zip(json.loads(response.headers["metadata"])["data"], matrices, strict=True):
        rows = np.frombuffer(response.content[entry["start"] : entry["end"]], "<f4").reshape(entry["shape"])
        np.testing.assert_allclose(rows, matrix, atol=1e-5)


def test_one_vector_is_that_of_embeddings(serving: Any) -> None:
    answer = post(serving, "/pooling", input=TEXTS).json()
    pooled = np.array([item["data"] for item in answer["data"]], np.float32)
    np.testing.assert_allclose(pooled, serving.embed(TEXTS), atol=1e-6)


def test_tokens_there_and_back(serving: Any, sentence_transformer: Any) -> None:
    tokenizer = sentence_transformer.tokenizer
    for text in TEXTS:
        answer = post(serving, "/tokenize", prompt=text, return_token_strs=True).json()
        ids = tokenizer.encode(text, truncation=False)
        assert answer == {
            "count": len(ids),
            "max_model_len": 256,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids),
        }
        assert post(serving, "/detokenize", tokens=ids).json() == {"prompt": tokenizer.decode(ids)}


def test_this_model_has_no_chat_template(serving: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    for path in ("/v1/embeddings", "/pooling", "/tokenize"):
        error = httpx2.post(f"{serving.url}{path}", json=body, timeout=120).json()["error"]
        assert error["code"] == 400
        assert error["message"].startswith("As of transformers v4.44, default chat template is no longer allowed")
