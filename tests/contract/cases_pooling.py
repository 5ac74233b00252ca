"""`/pooling`."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np

from .case import Case, Check, bad, misfit, ok
from .cases_request import LONG, TEXT
from .client import Api, Reply, unpacked
from .models import DIM, FAIL, SLOW


def pooled(rows: str, name: str, check: Check | None = None, server: str = "tiny", **body: Any) -> Case:
    """A POST to /pooling that is answered."""
    return ok(rows, f"pooling {name}", {"input": TEXT, **body}, check, path="/pooling", server=server)


def one_vector(reply: Reply, api: Api) -> None:
    """A vector for each input, that of /v1/embeddings."""
    answer = reply.json
    assert re.fullmatch(r"pooling-[0-9a-f]{16}", answer["id"])
    assert answer["object"] == "list"
    (item,) = answer["data"]
    assert set(item) == {"index", "object", "data"}
    assert item["object"] == "pooling"
    np.testing.assert_allclose([item["data"]], api.vectors(TEXT), atol=1e-5)


def matrices(*lengths: int, unit: bool = True) -> Check:
    """A vector for each token."""

    def check(reply: Reply, api: Api) -> None:
        assert reply.json["id"].startswith("pooling-")
        assert [item["object"] for item in reply.json["data"]] == ["pooling"] * len(lengths)
        assert [item["index"] for item in reply.json["data"]] == list(range(len(lengths)))
        for item, length in zip(reply.json["data"], lengths, strict=True):
            matrix = np.array(item["data"], np.float32)
            assert matrix.shape == (length, DIM)
            norms = np.linalg.norm(matrix, axis=1)
            assert (abs(norms - 1) < 1e-4).all() == unit, norms
        assert reply.tokens == sum(lengths)

    return check


def _reference(api: Api, **options: Any) -> Any:
    reply = api.post({"input": [TEXT, "a"], "task": "token_embed", **options}, "/pooling")
    return [np.array(item["data"], np.float32) for item in reply.json["data"]]


def matrices_in_base64(reply: Reply, api: Api) -> None:
    """Row by row."""
    for item, expected in zip(reply.json["data"], _reference(api), strict=True):
        np.testing.assert_allclose(unpacked(base64.b64decode(item["data"])).reshape(-1, DIM), expected, atol=1e-5)


def matrices_in_bytes(dtype: str, order: str) -> Check:
    """Row by row, the shapes in the header."""

    def check(reply: Reply, api: Api) -> None:
        metadata = json.loads(reply.headers["metadata"])
        assert metadata["id"].startswith("pooling-")
        assert reply.headers["content-length"] == str(len(reply.body))
        assert metadata["data"][-1]["end"] == len(reply.body)
        for item, expected in zip(metadata["data"], _reference(api), strict=True):
            assert item["shape"] == list(expected.shape)
            rows = unpacked(reply.body[item["start"] : item["end"]], dtype, order).astype(np.float32)
            np.testing.assert_allclose(rows.reshape(-1, DIM), expected, atol=0.01)

    return check


def _size(reply: Reply, size: int) -> None:
    assert len(reply.body) == size


CASES: list[Case] = [
    # Pooling
    pooled("E-PTS-01 E-PTS-02", "embed", one_vector, task="embed"),
    pooled("E-PTS-01 E-PTS-03", "token_embed", matrices(4), task="token_embed"),
    pooled("E-PTS-03", "two inputs", matrices(4, 3), task="token_embed", input=[TEXT, "a"]),
    pooled("E-PTS-03", "ids", matrices(2, 1), task="token_embed", input=[[5, 6], [7]]),
    pooled("E-PTS-03", "as they are", matrices(4, unit=False), task="token_embed", use_activation=False),
    pooled("E-PTS-03", "a model without a Normalize module", matrices(4), server="raw", task="token_embed"),
    pooled("E-PTS-04", "base64", matrices_in_base64, task="token_embed", input=[TEXT, "a"], encoding_format="base64"),
    *(
        pooled(
            "E-PTS-04",
            f"bytes {dtype} {order}",
            matrices_in_bytes(dtype, order),
            task="token_embed",
            input=[TEXT, "a"],
            encoding_format="bytes",
            embed_dtype=dtype,
            endianness=order,
        )
        for dtype, order in (("float32", "native"), ("float16", "big"), ("bfloat16", "little"))
    ),
    pooled(
        "E-PTS-04",
        "bytes_only",
        lambda r, _: _size(r, 7 * DIM * 4),
        task="token_embed",
        input=[TEXT, "a"],
        encoding_format="bytes_only",
    ),
    *(
        bad(
            "E-PTS-05",
            f"dimensions {size}",
            {"input": TEXT, "task": task, "dimensions": size},
            "dimensions is currently not supported",
            path="/pooling",
        )
        for size in (8, DIM)
        for task in ("embed", "token_embed")
    ),
    *(
        bad("E-PTS-06", f"task {task}", {"input": TEXT, "task": task}, f"Unsupported task: '{task}'", path="/pooling")
        for task in ("classify", "token_classify", "plugin")
    ),
    Case("E-PTS-06", "task nonsense", {"input": TEXT, "task": "nonsense"}, path="/pooling", status=400),
    pooled("E-PTS-07", "all", matrices(4), server="all", task="token_embed"),
    pooled("E-PTS-07", "all, no task", matrices(4), server="all"),
    pooled("E-PTS-02", "no task", one_vector),
    bad("E-PTS-08", "too long", {"input": LONG, "task": "token_embed"}, "maximum context length", path="/pooling"),
    bad(
        "E-PTS-08", "out of vocabulary", {"input": [9999], "task": "token_embed"}, "out of vocabulary", path="/pooling"
    ),
    bad("E-PTS-08", "too many inputs", {"input": ["a"] * 5}, r"\b4\b", path="/pooling", server="limited"),
    misfit("E-PTS-08", "a mixed list", {"input": ["a", 1]}, path="/pooling"),
    Case("E-PTS-08", "unknown model", {"input": "a", "model": "gpt-9"}, path="/pooling", status=404),
    Case("E-PTS-08", "fails in the model", {"input": FAIL, "task": "token_embed"}, path="/pooling", status=500),
    Case("E-PTS-08", "deadline", {"input": SLOW}, path="/pooling", headers={"x-request-timeout-ms": "100"}, status=504),
    pooled(
        "E-PTS-08", "truncated", matrices(5), task="token_embed", input="the queue a b c d", truncate_prompt_tokens=5
    ),
]
