"""Forms of the answer: JSON, bytes, number formats, headers of success."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np

from .case import Case, Check, bad, ok
from .cases_request import TEXT, a
from .client import NUMPY, Api, Reply, unpacked
from .models import DIM, NOT_FINITE

_TEXTS = ["the queue", "a", "", "b c d"]
_ORDERS = ("native", "little", "big")
_TIMINGS = ("x-queue-time-ms", "x-inference-time-ms", "x-total-time-ms")
_BYTES = {"content-type": "application/octet-stream"}


def several(**fields: Any) -> dict[str, Any]:
    """A body with four texts."""
    return {"input": _TEXTS, **fields}


def packed(dtype: str, order: str, model: str = "tiny", size: int = DIM) -> Check:
    """Four packed vectors in one block, with the header that says where they lie or without."""

    def check(reply: Reply, api: Api) -> None:
        width = NUMPY[dtype].itemsize * size
        assert reply.headers["content-length"] == str(len(reply.body)) == str(4 * width)
        options = {"dimensions": size} if size != DIM else {}
        _close(unpacked(reply.body, dtype, order).reshape(4, size), api.vectors(_TEXTS, **options), dtype)
        if "metadata" in reply.headers:
            _metadata(reply, dtype, order, model, width, size)

    return check


def _metadata(reply: Reply, dtype: str, order: str, model: str, width: int, size: int) -> None:
    said = json.loads(reply.headers["metadata"])
    assert reply.headers["metadata"].isascii()
    assert reply.headers["metadata"] == json.dumps(said)  # with Python's separators
    assert set(said) == {"id", "created", "model", "data", "usage"}
    assert said["id"].startswith("embd-")
    assert said["model"] == model
    tokens = 4 + 3 + 2 + 5
    assert said["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert said["data"] == [
        {
            "index": index,
            "embed_dtype": dtype,
            "endianness": order,
            "start": index * width,
            "end": (index + 1) * width,
            "shape": [size],
        }
        for index in range(4)
    ]


def in_metadata(name: str) -> Check:
    """The id in the header, whatever characters it has."""

    def check(reply: Reply, api: Api) -> None:
        assert reply.headers["metadata"].isascii()
        assert json.loads(reply.headers["metadata"])["id"] == name
        assert "x-evil" not in reply.headers

    return check


def in_base64(dtype: str, order: str) -> Check:
    """Four vectors, each packed and in base64."""

    def check(reply: Reply, api: Api) -> None:
        rows = [base64.b64decode(item["embedding"], validate=True) for item in reply.json["data"]]
        assert all(len(row) == DIM * NUMPY[dtype].itemsize for row in rows)
        _close(np.stack([unpacked(row, dtype, order) for row in rows]), api.vectors(_TEXTS), dtype)

    return check


def _close(vectors: Any, expected: Any, dtype: str) -> None:
    step = {1: 0.26, 2: 0.01, 4: 1e-4}[NUMPY[dtype].itemsize]
    np.testing.assert_allclose(
        vectors.astype(np.float32), expected, rtol=step, atol=0.002 if dtype.startswith("fp8") else 1e-5
    )


def envelope(reply: Reply, api: Api) -> None:
    """What stands around the vectors."""
    answer = reply.json
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert re.fullmatch(r"embd-[0-9a-f]{16}", answer["id"])
    assert answer["id"] == f"embd-{reply.headers['x-request-id']}"
    assert answer["object"] == "list"
    assert isinstance(answer["created"], int)
    assert answer["usage"] == {
        "prompt_tokens": 14,
        "total_tokens": 14,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    for index, item in enumerate(answer["data"]):
        assert list(item) == ["index", "object", "embedding"]
        assert item["index"] == index
        assert item["object"] == "embedding"
    assert reply.headers["content-length"] == str(len(reply.body))


def same_bits(reply: Reply, api: Api) -> None:
    """Floats as printed are the floats that base64 holds."""
    rows = np.array([item["embedding"] for item in reply.json["data"]], np.float32)
    # One row alone, so that both requests are the same batch.
    assert rows.tobytes() == api.post(a(encoding_format="base64")).vectors.tobytes()


def overflown(dtype: str) -> Check:
    """Raw vectors of about 10^6 in formats that end earlier."""

    def check(reply: Reply, api: Api) -> None:
        with np.errstate(over="ignore"):
            expected = api.vectors(TEXT).astype(NUMPY[dtype]).astype(np.float32)
        assert not np.isfinite(expected).all()
        got = unpacked(reply.body, dtype).astype(np.float32)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected)[0])

    return check


CASES: list[Case] = [
    ok(
        "E-RES-01 E-RES-02 E-RES-04 E-RES-05 E-RES-11",
        "float",
        several(),
        envelope,
        answers={"content-type": "application/json"},
    ),
    ok(
        "E-RES-01 E-RES-05",
        "base64",
        several(encoding_format="base64"),
        envelope,
        answers={"content-type": "application/json"},
    ),
    ok("E-RES-06", "float in full", a(), same_bits),
    ok("E-RES-07", "base64 by default", several(encoding_format="base64"), in_base64("float32", "little")),
    *(
        ok("E-RES-08", f"float with {fields}", a(**fields), same_bits)
        for fields in (
            {"embed_dtype": "float16"},
            {"endianness": "big"},
            {"embed_dtype": "fp8_e4m3", "endianness": "big"},
        )
    ),
    *(
        Case("E-RES-09 E-ERR-10", f"not finite, {form}", a(input=NOT_FINITE, encoding_format=form), status=500)
        for form in ("float", "base64", "bytes", "bytes_only")
    ),
    *(
        ok(
            "E-NUM-01 E-NUM-02 E-NUM-03 E-NUM-06 E-NUM-07 E-NUM-08",
            f"bytes {dtype} {order}",
            several(encoding_format="bytes", embed_dtype=dtype, endianness=order),
            packed(dtype, order),
            answers={**_BYTES, "metadata": ".+"},
        )
        for dtype in NUMPY
        for order in _ORDERS
    ),
    *(
        ok(
            "E-NUM-04 E-NUM-06 E-NUM-07",
            f"bytes_only {dtype} {order}",
            several(encoding_format="bytes_only", embed_dtype=dtype, endianness=order),
            packed(dtype, order),
            answers={**_BYTES, "metadata": None},
        )
        for dtype in NUMPY
        for order in _ORDERS
    ),
    *(
        ok(
            "E-NUM-11 E-NUM-06 E-NUM-07",
            f"base64 {dtype} {order}",
            several(encoding_format="base64", embed_dtype=dtype, endianness=order),
            in_base64(dtype, order),
        )
        for dtype in NUMPY
        for order in _ORDERS
    ),
    *(
        ok(
            "E-NUM-02 E-REQ-17",
            f"metadata for the id {name!r}",
            a(encoding_format="bytes", request_id=name),
            in_metadata(f"embd-{name}"),
        )
        for name in ("mine", "é", "a\r\nx-evil: 1", '"quoted"', "\0", "🎉")
    ),
    ok(
        "E-NUM-03 E-DIM-06",
        "bytes, shortened",
        several(encoding_format="bytes", dimensions=8),
        packed("float32", "native", size=8),
    ),
    ok(
        "E-NUM-04",
        "bytes without metadata",
        several(encoding_format="bytes"),
        packed("float32", "native"),
        headers={"x-metadata": "omit"},
        answers={**_BYTES, "metadata": None},
    ),
    ok(
        "E-NUM-04",
        "metadata by word",
        several(encoding_format="bytes"),
        packed("float32", "native"),
        headers={"x-metadata": "send"},
        answers={"metadata": ".+"},
    ),
    bad("E-NUM-04", "another word", several(encoding_format="bytes"), "omit", headers={"x-metadata": "no"}),
    bad(
        "E-NUM-05",
        "a long metadata header",
        {"input": ["a"] * 600, "encoding_format": "bytes"},
        "(?s)(?=.*bytes_only)(?=.*x-metadata: omit)",
    ),
    ok(
        "E-NUM-05",
        "500 inputs",
        {"input": ["a"] * 500, "encoding_format": "bytes"},
        answers={"metadata": ".{50000,61440}"},
    ),
    ok(
        "E-NUM-05 E-NUM-04",
        "600 inputs without metadata",
        {"input": ["a"] * 600, "encoding_format": "bytes"},
        headers={"x-metadata": "omit"},
        answers={"content-length": str(600 * DIM * 4)},
    ),
    *(
        ok(
            "E-NUM-10",
            f"overflow, {dtype}",
            a(encoding_format="bytes_only", embed_dtype=dtype),
            overflown(dtype),
            server="raw",
        )
        for dtype in ("float16", "fp8_e4m3", "fp8_e5m2")
    ),
    *(
        ok(
            "E-HDR-03",
            f"timings, {form}",
            a(encoding_format=form),
            lambda r, _: [float(r.headers[name]) for name in _TIMINGS] and int(r.headers["x-compute-tokens"]),
            answers={"x-compute-tokens": "4"},
        )
        for form in ("float", "base64")
    ),
    ok("E-NUM-08 E-HDR-04", "headers of bytes", a(encoding_format="bytes_only"), answers={"x-truncated-inputs": "0"}),
    ok("E-RES-02", "a request id of one's own", a(), headers={"X-Request-Id": "r/1"}, answers={"x-request-id": "r/1"}),
    ok(
        "E-NUM-02",
        "id in metadata",
        a(encoding_format="bytes"),
        headers={"x-request-id": "r2"},
        answers={"metadata": '.*"id": "embd-r2".*'},
    ),
]
