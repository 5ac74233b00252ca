from __future__ import annotations

import base64
import json
from typing import get_args

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embedstream.api import responses
from embedstream.api.responses import Envelope, Layout
from embedstream.api.schemas import Endianness
from embedstream.producer import VectorType
from embedstream.shared.errors import JobFailed

ENVELOPE = Envelope("embd-1", 1_761_000_000, "tiny", 9)
ENDIANNESSES: tuple[Endianness, ...] = get_args(Endianness)

shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


def read_back(data: bytes, dim: int, kind: VectorType, endianness: Endianness) -> NDArray[np.generic]:
    """(inputs, dim): what a client makes of the bytes, as unsigned words so that NaNs compare."""
    word = np.dtype(f"u{kind.numpy.itemsize}").newbyteorder(">" if endianness == "big" else "<")
    return np.frombuffer(data, word).reshape(-1, dim)


@given(data=st.data(), kind=st.sampled_from(VectorType), endianness=st.sampled_from(ENDIANNESSES), shape=shapes)
def test_bytes_and_base64_give_the_vectors_back(
    data: st.DataObject, kind: VectorType, endianness: Endianness, shape: tuple[int, int]
) -> None:
    words = data.draw(hnp.arrays(np.dtype(f"<u{kind.numpy.itemsize}"), shape))  # any bit pattern, NaNs included
    vectors = words.view(kind.numpy)
    packed = responses.pack(vectors, endianness)

    body = bytes(responses.bytes_response(packed, {}).body)
    np.testing.assert_array_equal(read_back(body, shape[1], kind, endianness), words)

    items = orjson.loads(b"[" + b",".join(responses.base64_pieces(packed)) + b"]")
    assert [item["index"] for item in items] == list(range(shape[0]))
    decoded = b"".join(base64.b64decode(item["embedding"], validate=True) for item in items)
    assert decoded == body


@given(hnp.arrays(np.float32, shapes, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_floats_give_the_vectors_back(vectors: NDArray[np.float32]) -> None:
    items = orjson.loads(b"[" + b",".join(responses.float_pieces(vectors)) + b"]")
    read = np.array([item["embedding"] for item in items], np.float32)
    np.testing.assert_array_equal(read, vectors)
    assert {item["object"] for item in items} == {"embedding"}


def test_a_known_value_in_each_order() -> None:
    one = np.ones((1, 1))
    assert responses.pack(one.astype("<f4"), "native").tobytes() == b"\x00\x00\x80\x3f"
    assert responses.pack(one.astype("<f4"), "little").tobytes() == b"\x00\x00\x80\x3f"
    assert responses.pack(one.astype("<f4"), "big").tobytes() == b"\x3f\x80\x00\x00"
    assert responses.pack(one.astype(ml_dtypes.bfloat16), "big").tobytes() == b"\x3f\x80"


def test_matrices_in_another_memory_order_are_read_by_rows() -> None:
    matrix = np.asfortranarray(np.arange(12, dtype="<f4").reshape(3, 4))
    assert responses.pack(matrix, "little").tobytes() == np.arange(12, dtype="<f4").tobytes()
    (piece,) = responses.float_pieces(matrix)
    assert orjson.loads(b"[" + piece + b"]")[1]["embedding"] == [4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_of_floats_never_holds_null(bad: float) -> None:
    vectors = np.ones((3, 2), np.float32)
    vectors[2, 1] = bad
    with pytest.raises(JobFailed, match="NaN or infinity"):
        list(responses.float_pieces(vectors))


async def test_large_responses_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_PIECE_FLOATS", 4)
    monkeypatch.setattr(responses, "_PIECE_BYTES", 16)
    vectors = np.arange(10, dtype="<f4").reshape(5, 2)
    packed = responses.pack(vectors, "native")
    assert len(list(responses.float_pieces(vectors))) == 3
    assert len(list(responses.base64_pieces(packed))) == 3

    expected = [base64.b64encode(row.tobytes()).decode() for row in vectors]
    for pieces, embeddings in (
        (responses.float_pieces(vectors), vectors.tolist()),
        (responses.base64_pieces(packed), expected),
    ):
        body = orjson.loads((await responses.json_response(ENVELOPE, pieces, {})).body)
        assert [item["index"] for item in body["data"]] == [0, 1, 2, 3, 4]
        assert [item["embedding"] for item in body["data"]] == embeddings


async def test_the_body_has_exactly_the_fields_of_the_contract() -> None:
    response = await responses.json_response(
        ENVELOPE, responses.float_pieces(np.ones((1, 2), np.float32)), {"x-a": "b"}
    )
    assert json.loads(bytes(response.body)) == {
        "id": "embd-1",
        "object": "list",
        "created": 1_761_000_000,
        "model": "tiny",
        "data": [{"index": 0, "object": "embedding", "embedding": [1.0, 1.0]}],
        "usage": {
            "prompt_tokens": 9,
            "total_tokens": 9,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-a"] == "b"


@given(
    inputs=st.integers(1, 30),
    dim=st.integers(1, 5000),
    kind=st.sampled_from(VectorType),
    endianness=st.sampled_from(ENDIANNESSES),
    model=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
def test_metadata_is_what_json_dumps_would_write(
    inputs: int, dim: int, kind: VectorType, endianness: Endianness, model: str
) -> None:
    size = dim * kind.numpy.itemsize
    expected = {
        "id": 'embd-"quoted"',
        "created": 1_761_000_000,
        "model": model,
        "data": [
            {
                "index": index,
                "embed_dtype": kind.value,
                "endianness": endianness,
                "start": index * size,
                "end": (index + 1) * size,
                "shape": [dim],
            }
            for index in range(inputs)
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    header = responses.metadata(
        Envelope('embd-"quoted"', 1_761_000_000, model, 9), Layout(inputs, dim, kind, endianness)
    )
    assert header == json.dumps(expected)
    assert header.isascii()
