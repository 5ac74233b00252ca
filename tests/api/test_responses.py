from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, get_args

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embedstream.api import responses
from embedstream.api.context import Context
from embedstream.api.json_answer import JsonAnswer
from embedstream.api.layout import Envelope, Layout, bounded_metadata, metadata
from embedstream.api.responses import EMBEDDING, POOLING, Form
from embedstream.api.schemas import EncodingFormat, Endianness
from embedstream.api.turns import Turns
from embedstream.producer import EmbeddedSlice, VectorType
from embedstream.shared.errors import InvalidInput, JobFailed

ENVELOPE = Envelope("embd-1", 1_761_000_000, "tiny", 9)
ENDIANNESSES: tuple[Endianness, ...] = get_args(Endianness)
NOBODY: Mapping[int, Exception] = {}

shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def whole(vectors: NDArray[Any], tokens: NDArray[np.uint32] | None = None, first: int = 0) -> EmbeddedSlice:
    return EmbeddedSlice(first, vectors, np.ones(len(vectors), np.uint32) if tokens is None else tokens)


def form(encoding: EncodingFormat, endianness: Endianness = "native", *, per_token: bool = False) -> Form:
    return Form(encoding, endianness, POOLING if per_token else EMBEDDING, per_token)


def items_of(
    result: EmbeddedSlice, how: Form, failures: Mapping[int, Exception] = NOBODY, pieces: int | None = None
) -> list[dict[str, Any]]:
    made = list(responses.json_items(result, how, failures))
    assert pieces is None or len(made) == pieces
    items: list[dict[str, Any]] = orjson.loads(b"[" + b"".join(made) + b"]")
    return items


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
    body = responses.pack(vectors, endianness).tobytes()
    np.testing.assert_array_equal(read_back(body, shape[1], kind, endianness), words)

    items = items_of(whole(vectors), form("base64", endianness))
    assert [item["index"] for item in items] == list(range(shape[0]))
    decoded = b"".join(base64.b64decode(item["embedding"], validate=True) for item in items)
    assert decoded == body


@given(hnp.arrays(np.float32, shapes, elements=finite))
def test_floats_give_the_vectors_back(vectors: NDArray[np.float32]) -> None:
    items = items_of(whole(vectors), form("float"))
    read = np.array([item["embedding"] for item in items], np.float32)
    np.testing.assert_array_equal(read, vectors)
    assert {item["object"] for item in items} == {"embedding"}


@given(
    data=st.data(),
    tokens=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    dim=st.integers(1, 4),
    most=st.integers(1, 20),
    endianness=st.sampled_from(ENDIANNESSES),
)
def test_matrices_come_whole_however_they_are_cut(
    data: st.DataObject, tokens: list[int], dim: int, most: int, endianness: Endianness
) -> None:
    """An input without tokens is one that failed."""
    vectors = data.draw(hnp.arrays(np.float32, (sum(tokens), dim), elements=finite))
    matrices = np.split(vectors, np.cumsum(tokens)[:-1])
    result = whole(vectors, np.array(tokens, np.uint32))
    failures = {index: InvalidInput("no") for index, count in enumerate(tokens) if not count}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "_PIECE_FLOATS", most)
        patch.setattr(responses, "_PIECE_BYTES", 4 * most)
        as_floats = items_of(result, form("float", per_token=True), failures)
        as_base64 = items_of(result, form("base64", endianness, per_token=True), failures)
    for items in (as_floats, as_base64):
        assert [item["index"] for item in items] == list(range(len(tokens)))
        assert [item["object"] for item in items] == ["pooling" if count else "error" for count in tokens]
    for index in set(range(len(tokens))) - set(failures):
        read = np.array(as_floats[index]["data"], np.float32)
        np.testing.assert_array_equal(read, matrices[index])
        packed = base64.b64decode(as_base64[index]["data"], validate=True)
        np.testing.assert_array_equal(
            np.frombuffer(packed, ">f4" if endianness == "big" else "<f4"), matrices[index].ravel()
        )


def test_a_known_value_in_each_order() -> None:
    one = np.ones((1, 1))
    assert responses.pack(one.astype("<f4"), "native").tobytes() == b"\x00\x00\x80\x3f"
    assert responses.pack(one.astype("<f4"), "little").tobytes() == b"\x00\x00\x80\x3f"
    assert responses.pack(one.astype("<f4"), "big").tobytes() == b"\x3f\x80\x00\x00"
    assert responses.pack(one.astype(ml_dtypes.bfloat16), "big").tobytes() == b"\x3f\x80"


def test_matrices_in_another_memory_order_are_read_by_rows() -> None:
    matrix = np.asfortranarray(np.arange(12, dtype="<f4").reshape(3, 4))
    assert responses.pack(matrix, "little").tobytes() == np.arange(12, dtype="<f4").tobytes()
    assert items_of(whole(matrix), form("float"))[1]["embedding"] == [4.0, 5.0, 6.0, 7.0]


def test_inputs_that_failed_stand_among_the_others() -> None:
    vectors = np.arange(6, dtype="<f4").reshape(3, 2)
    failures = {1: InvalidInput("too much of it", param="input"), 2: JobFailed("no vector")}
    for encoding in ("float", "base64"):
        items = items_of(whole(vectors), form(encoding), failures)
        assert items[0]["object"] == "embedding"
        assert items[1] == {
            "index": 1,
            "object": "error",
            "error": {"message": "too much of it", "type": "BadRequestError", "param": "input", "code": 400},
        }
        assert items[2]["error"] == {
            "message": "no vector",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        }


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_input_of_many_vectors_that_failed_is_an_error_too(
    encoding: EncodingFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "_PIECE_FLOATS", 4)
    monkeypatch.setattr(responses, "_PIECE_BYTES", 16)
    vectors = np.full((6, 2), np.nan, "<f4")
    vectors[-1] = 1
    piece = whole(vectors, np.array([5, 1], np.uint32), first=3)
    items = items_of(piece, form(encoding, per_token=True), {3: JobFailed("no vector")})
    assert [(item["index"], item["object"]) for item in items] == [(3, "error"), (4, "pooling")]


def test_large_responses_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_PIECE_FLOATS", 4)
    monkeypatch.setattr(responses, "_PIECE_BYTES", 16)
    vectors = np.arange(10, dtype="<f4").reshape(5, 2)
    expected = [base64.b64encode(row.tobytes()).decode() for row in vectors]
    by_form: list[tuple[Form, list[Any]]] = [(form("float"), vectors.tolist()), (form("base64"), expected)]
    for how, embeddings in by_form:
        items = items_of(whole(vectors), how, pieces=3)
        assert [item["index"] for item in items] == [0, 1, 2, 3, 4]
        assert [item["embedding"] for item in items] == embeddings


async def test_the_body_has_exactly_the_fields_of_the_contract() -> None:
    how, piece = form("float"), whole(np.ones((1, 2), np.float32))
    answer = JsonAnswer(ENVELOPE, how, Context("1"), Turns(), partial=False)
    made = [each async for each in answer.pieces(piece, Layout(piece.tokens, 2, VectorType.FLOAT32, "native"))]
    assert json.loads(b"".join([answer.opening, *made, answer.closing()])) == {
        "id": "embd-1",
        "object": "list",
        "created": 1_761_000_000,
        "model": "tiny",
        "data": [{"index": 0, "object": "embedding", "embedding": [1.0, 1.0]}],
        "usage": {
            "prompt_tokens": 1,
            "total_tokens": 1,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }


def test_usage_counts_padding_but_not_what_failed() -> None:
    tokens = np.array([3, 0, 7], np.uint32)
    assert Form("float", "native").usage(tokens) == 10
    assert Form("float", "native", least_tokens=5).usage(tokens) == 5 + 7


@given(
    tokens=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    dim=st.integers(1, 5000),
    kind=st.sampled_from(VectorType),
    endianness=st.sampled_from(ENDIANNESSES),
    model=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    per_token=st.booleans(),
)
def test_metadata_is_what_json_dumps_would_write(
    tokens: list[int], dim: int, kind: VectorType, endianness: Endianness, model: str, *, per_token: bool
) -> None:
    size, start, entries = dim * kind.numpy.itemsize, 0, []
    for index, count in enumerate(tokens):
        end = start + size * (count if per_token else 1)
        entries.append(
            {
                "index": index,
                "embed_dtype": kind.value,
                "endianness": endianness,
                "start": start,
                "end": end,
                "shape": [count, dim] if per_token else [dim],
            }
        )
        start = end
    expected = {
        "id": 'embd-"quoted"',
        "created": 1_761_000_000,
        "model": model,
        "data": entries,
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    envelope = Envelope('embd-"quoted"', 1_761_000_000, model, 9)
    layout = Layout(np.array(tokens, np.uint32), dim, kind, endianness, per_token)
    header = metadata(envelope, layout)
    assert header == json.dumps(expected)
    assert header.isascii()
    assert layout.n_bytes == start
    assert bounded_metadata(envelope, layout, len(header)) == header
    with pytest.raises(InvalidInput, match=f"more than the limit of {len(header) - 1} "):
        bounded_metadata(envelope, layout, len(header) - 1)


def test_a_header_that_is_far_too_long_is_not_made() -> None:
    layout = Layout(np.ones(100_000, np.uint32), 4, VectorType.FLOAT32, "native")
    with pytest.raises(InvalidInput, match="for 100000 inputs has at least 9000000 bytes"):
        bounded_metadata(ENVELOPE, layout, 61_440)
