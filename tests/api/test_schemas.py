from __future__ import annotations

from typing import Any, get_args

import orjson
import pytest

from embedstream.api.errors import SchemaError
from embedstream.api.schemas import EmbeddingRequest, EmbedDtype, parse
from embedstream.producer import VectorType
from embedstream.shared.errors import InvalidInput


def read(**fields: Any) -> EmbeddingRequest:
    return parse("application/json", orjson.dumps(fields))


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        (["1", "2"], ["1", "2"]),  # text, though each would make a number
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([], []),  # the producer has the words for it
        ([[]], [[]]),
        ([1.0, 2], [[1, 2]]),
        ([[1.0], [2]], [[1], [2]]),
        ([True, 5], [[1, 5]]),
        ([-1], [[-1]]),
    ],
)
def test_the_four_forms_of_input(given: object, inputs: object) -> None:
    assert read(input=given).input == inputs


@pytest.mark.parametrize(
    "given",
    [5, True, {"a": 1}, ["a", 1], [1, "2"], [[1], "a"], [[1], 2], [["a"]], [[[1]]], [None], [["a", 1]], [1.5], [[1.5]]],
)
def test_other_inputs_are_refused(given: object) -> None:
    with pytest.raises(SchemaError, match="1 validation errors:") as caught:
        read(input=given)
    assert caught.value.param == "body.input"


def test_a_number_that_is_too_large_for_json_is_refused() -> None:
    with pytest.raises(SchemaError):
        parse("application/json", b'{"input": [1e400]}')


def test_defaults() -> None:
    request = read(input="a")
    assert (request.model, request.encoding_format, request.embed_dtype, request.endianness) == (
        "",
        "float",
        "float32",
        "native",
    )
    options = request.options(auto_truncate=False)
    assert options.vectors.dimensions is None
    assert options.vectors.normalize is None
    assert options.truncate_prompt_tokens is None
    assert options.add_special_tokens


@pytest.mark.parametrize("name", sorted(EmbeddingRequest.model_fields.keys() - {"input"}))
def test_null_means_absent(name: str) -> None:
    assert read(input="a", **{name: None}) == read(input="a")


def test_unknown_fields_are_ignored() -> None:
    assert read(input="a", stream=True, input_type="query") == read(input="a")


def test_scalars_are_coerced_the_lax_way() -> None:
    request = read(input="a", dimensions="8", truncate_prompt_tokens=1.0, normalize="true", add_special_tokens=0)
    assert (request.dimensions, request.truncate_prompt_tokens, request.normalize) == (8, 1, True)
    assert not request.add_special_tokens


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("encoding_format", "bad", "literal_error"),
        ("embed_dtype", "int8", "literal_error"),
        ("endianness", "middle", "literal_error"),
        ("dimensions", 8.5, "int_from_float"),
        ("dimensions", "many", "int_parsing"),
        ("truncate_prompt_tokens", -2, "greater_than_equal"),
        ("user", 5, "string_type"),
        ("model", 5, "string_type"),
        ("normalize", "perhaps", "bool_parsing"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(field: str, value: object, word: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read(input="a", **{field: value})
    assert caught.value.param == f"body.{field}"
    message = str(caught.value)
    assert message.startswith("1 validation errors:\n  {'type': '" + word)
    assert f"'loc': ('body', '{field}')" in message
    assert f"'input': {value!r}}}" in message


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SchemaError, match="3 validation errors:") as caught:
        read(input=None, encoding_format="bad", dimensions="x")
    assert caught.value.param == "body.input"
    assert "'type': 'missing'" in str(caught.value)


def test_long_values_are_cut() -> None:
    with pytest.raises(SchemaError) as caught:
        read(input="a", encoding_format="y" * 5000)
    assert "y" * 200 in str(caught.value)
    assert "y" * 201 not in str(caught.value)
    with pytest.raises(SchemaError) as caught:
        read(input=[["word" * 100] * 100] * 10)
    assert len(str(caught.value)) < 600


def test_at_most_ten_problems_are_listed() -> None:
    fields = dict.fromkeys(EmbeddingRequest.model_fields, ("wrong", 1))
    with pytest.raises(SchemaError, match=f"^{len(fields)} validation errors:") as caught:
        read(**fields)
    assert len(fields) > 10
    assert str(caught.value).count("'loc'") == 10


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"input": "\\ud800"}', b"\xff"])
def test_bad_json(body: bytes) -> None:
    with pytest.raises(SchemaError, match="json_invalid") as caught:
        parse("application/json", body)
    assert caught.value.param == "body"


@pytest.mark.parametrize("body", [b"[]", b'"a"', b"5", b"null"])
def test_the_body_must_be_an_object(body: bytes) -> None:
    with pytest.raises(SchemaError, match="dict_type") as caught:
        parse("application/json", body)
    assert caught.value.param == "body"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_content_type_may_have_parameters(content_type: str) -> None:
    assert parse(content_type, b'{"input": "a"}').input == ["a"]


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data; boundary=x", "application/jsonl"])
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(SchemaError, match="Only 'application/json' is allowed") as caught:
        parse(content_type, b'{"input": "a"}')
    assert caught.value.param is None


def test_chat_messages_are_refused_by_name() -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(InvalidInput, match=r"`input` is required.*chat `messages`"):
        read(messages=messages)
    assert read(messages=messages, input="a").input == ["a"]


@pytest.mark.parametrize("value", [True, False])
def test_normalize_has_an_alias(value: bool) -> None:
    for fields in ({"normalize": value}, {"use_activation": value}, {"normalize": value, "use_activation": value}):
        assert read(input="a", **fields).options(auto_truncate=False).vectors.normalize is value
    with pytest.raises(InvalidInput, match="must not differ") as caught:
        read(input="a", normalize=value, use_activation=not value)
    assert caught.value.param == "normalize"


def test_dtypes_are_those_of_the_queue() -> None:
    assert set(get_args(EmbedDtype)) == {kind.value for kind in VectorType}


def test_floats_are_always_float32() -> None:
    for form, expected in (
        ("float", VectorType.FLOAT32),
        ("base64", VectorType.FLOAT16),
        ("bytes", VectorType.FLOAT16),
    ):
        options = read(input="a", encoding_format=form, embed_dtype="float16").options(auto_truncate=False)
        assert options.vectors.dtype is expected


def test_auto_truncate_only_stands_in() -> None:
    assert read(input="a").options(auto_truncate=True).truncate_prompt_tokens == -1
    assert read(input="a", truncate_prompt_tokens=4).options(auto_truncate=True).truncate_prompt_tokens == 4
