"""Forms, options, concurrency and refusals over HTTP, with the real model."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from typing import Any

import httpx2
import ml_dtypes
import numpy as np
import pytest

from embedstream.shared.connections import connect_sync

pytestmark = pytest.mark.integration

TEXTS = ["the queue", "a vector for each text", "", "ünïcödé 🎉"]
DTYPES: dict[str, Any] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def decoded(data: bytes, dtype: str, order: str) -> Any:
    plain = np.frombuffer(data, np.dtype(f"{'>' if order == 'big' else '<'}u{DTYPES[dtype].itemsize}"))
    return plain.astype(plain.dtype.newbyteorder("<")).view(DTYPES[dtype]).astype(np.float32)


@pytest.mark.parametrize("order", ["native", "little", "big"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_all_forms_hold_the_same_vectors(serving: Any, dtype: str, order: str) -> None:
    expected = serving.embed(TEXTS).astype(DTYPES[dtype]).astype(np.float32)
    body = {"input": TEXTS, "embed_dtype": dtype, "endianness": order}
    tolerance = {1: 0.3, 2: 0.01, 4: 1e-6}[DTYPES[dtype].itemsize]  # one step of the number format

    answer = serving.post({**body, "encoding_format": "base64"}).json()
    texts = [base64.b64decode(item["embedding"], validate=True) for item in answer["data"]]
    vectors = [np.stack([decoded(text, dtype, order) for text in texts])]

    response = serving.post({**body, "encoding_format": "bytes"})
    assert response.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(response.headers["metadata"])
    assert metadata["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    pieces = []
    for item in metadata["data"]:  # the header alone says how to read the body
        assert item["embed_dtype"] == dtype
        assert item["endianness"] == order
        piece = response.content[item["start"] : item["end"]]
        pieces.append(decoded(piece, item["embed_dtype"], item["endianness"]).reshape(item["shape"]))
    vectors.append(np.stack(pieces))
    assert metadata["data"][-1]["end"] == len(response.content)

    response = serving.post({**body, "encoding_format": "bytes_only"})
    assert "metadata" not in response.headers
    vectors.append(decoded(response.content, dtype, order).reshape(len(TEXTS), -1))
    response = serving.post({**body, "encoding_format": "bytes"}, **{"x-metadata": "omit"})
    assert "metadata" not in response.headers
    vectors.append(decoded(response.content, dtype, order).reshape(len(TEXTS), -1))

    for matrix in vectors:
        np.testing.assert_allclose(matrix, expected, rtol=tolerance, atol=1e-3)
    assert all((matrix == vectors[0]).mean() > 0.99 for matrix in vectors)


async def test_twelve_option_sets_of_one_text_at_once(serving: Any) -> None:
    raw = serving.embed(["the queue"], normalize=False)[0]
    sets = [(size, unit, dtype) for size in (384, 64) for unit in (True, False) for dtype in list(DTYPES)[:3]]
    async with httpx2.AsyncClient(base_url=serving.url, timeout=60) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    "/v1/embeddings",
                    json={
                        "input": "the queue",
                        "dimensions": size,
                        "normalize": unit,
                        "embed_dtype": dtype,
                        "encoding_format": "bytes_only",
                    },
                )
                for size, unit, dtype in sets
            )
        )
    for (size, unit, dtype), answer in zip(sets, answers, strict=True):
        expected = raw[:size] / np.linalg.norm(raw[:size]) if unit else raw[:size]
        tolerance = {2: 0.01, 4: 1e-5}[DTYPES[dtype].itemsize]
        np.testing.assert_allclose(decoded(answer.content, dtype, "little"), expected, rtol=tolerance, atol=1e-4)


async def test_five_hundred_mixed_requests_get_their_own_results(serving: Any) -> None:
    chance = random.Random(1)
    words = ["queue", "vector", "batch", "token", "model", "stream", "lane", "reply", "job", "row"]

    def some_text() -> str:
        return " ".join(chance.choices(words, k=chance.randint(1, 12)))

    requests: list[list[str]] = [[some_text() for _ in range(chance.choice([1, 1, 1, 2, 9]))] for _ in range(500)]
    distinct = sorted({text for texts in requests for text in texts})
    single: dict[str, Any] = {}
    for start in range(0, len(distinct), 1000):
        block = distinct[start : start + 1000]
        single |= dict(zip(block, serving.embed(block), strict=True))
    async with httpx2.AsyncClient(
        base_url=serving.url, timeout=120, limits=httpx2.Limits(max_connections=500)
    ) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}) for texts in requests)
        )
    for texts, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200
        vectors = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer.json()["data"]]
        np.testing.assert_allclose(vectors, [single[text] for text in texts], atol=3e-6)


def lane_adds(serving: Any) -> int:
    client = connect_sync(serving.redis_url)
    infos: list[Any] = [client.xinfo_stream(f"ek:{{all-MiniLM-L6-v2}}:q:{lane}") for lane in "ib"]
    client.close()
    return sum(info["entries-added"] for info in infos)


BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "JSON"),
    (b"[]", 400, "valid dictionary"),
    ({}, 400, "input"),
    ({"input": None}, 400, "input"),
    ({"input": 5}, 400, "input"),
    ({"input": {}}, 400, "input"),
    ({"input": []}, 400, "at least one prompt"),
    ({"input": ["a", 1]}, 400, "input"),
    ({"input": [[["a"]]]}, 400, "input"),
    ({"input": [1.5]}, 400, "input"),
    ({"input": "word " * 300}, 400, "maximum context length is 256 tokens"),
    ({"input": ["fine", "x" * 100_000]}, 400, "maximum context length is 256 tokens"),
    ({"input": [[1] * 257]}, 400, "maximum context length is 256 tokens"),
    ({"input": [30522]}, 400, "Token id 30522 is out of vocabulary"),
    ({"input": [[5, -1]]}, 400, "Token id -1 is out of vocabulary"),
    ({"input": [[]]}, 400, "cannot be empty"),
    ({"input": "a\ud800"}, 400, ""),
    ({"input": "a", "model": "gpt-9"}, 404, "`gpt-9` does not exist"),
    ({"input": "a", "model": 5}, 400, "model"),
    ({"input": "a", "encoding_format": "hex"}, 400, "literal_error"),
    ({"input": "a", "embed_dtype": "int8"}, 400, "literal_error"),
    ({"input": "a", "endianness": "middle"}, 400, "literal_error"),
    ({"input": "a", "dimensions": 0}, 400, "dimensions"),
    ({"input": "a", "dimensions": 385}, 400, "range [1, 384]"),
    ({"input": "a", "dimensions": "many"}, 400, "dimensions"),
    ({"input": "a", "normalize": "maybe"}, 400, "normalize"),
    ({"input": "a", "normalize": True, "use_activation": False}, 400, "normalize"),
    ({"input": "a", "truncate_prompt_tokens": 257}, 400, "greater than max_model_len"),
    ({"input": "a", "truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens"),
    ({"input": "a", "truncate_prompt_tokens": 0}, 400, "at least 3"),
    ({"input": "a", "truncate_prompt_tokens": 2}, 400, "at least 3"),
    ({"input": "a", "user": 5}, 400, "user"),
    ({"input": "a", "add_special_tokens": "perhaps"}, 400, "add_special_tokens"),
    ({"input": ["a"] * 2049}, 400, "2048"),
    ({"input": ["a"] * 600, "encoding_format": "bytes"}, 400, "bytes_only"),
]


def test_bad_requests_say_what_is_wrong_and_queue_nothing(serving: Any) -> None:
    before = lane_adds(serving)
    for body, status, words in BAD:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = httpx2.post(
            f"{serving.url}/v1/embeddings", content=content, headers={"content-type": "application/json"}, timeout=60
        )
        shown = str(body)[:80]
        assert response.status_code == status, (shown, response.text[:300])
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, shown
        assert error["code"] == status, shown
        assert words in error["message"] or words in (error["param"] or ""), (shown, error)
        assert response.headers["x-should-retry"] == "false", shown
    assert lane_adds(serving) == before
    assert serving.post({"input": "a"}).status_code == 200
    assert lane_adds(serving) == before + 1


def test_cut_inputs_are_counted(serving: Any) -> None:
    long = "word " * 300
    response = serving.post({"input": [long, "short", long], "truncate_prompt_tokens": -1})
    assert response.headers["x-truncated-inputs"] == "2"
    assert response.json()["usage"]["prompt_tokens"] == 256 + 3 + 256
    np.testing.assert_allclose(
        serving.embed([long], truncate_prompt_tokens=10), serving.embed(["word " * 8]), atol=1e-6
    )


def test_the_probes_and_the_list_of_models(serving: Any) -> None:
    for path in ("/health", "/ready", "/livez"):
        assert httpx2.get(serving.url + path).status_code == 200
    (card,) = httpx2.get(f"{serving.url}/v1/models").json()["data"]
    assert card["id"] == "all-MiniLM-L6-v2"
    assert card["max_model_len"] == 256
    assert card["dimension"] == 384
