from __future__ import annotations

import time
from typing import Any, get_args

import numpy as np
import orjson
import pytest

from embedstream.api.errors import SchemaError
from embedstream.api.inputs import Conversations
from embedstream.api.schemas import CHAT_ONLY, EmbeddingRequest, EmbedDtype, PoolingRequest
from embedstream.producer import VectorType
from embedstream.shared.errors import InvalidInput
from embedstream.shared.jobs import LongInputs, TruncationSide
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.settings import LongInputsName, Settings

parse = EmbeddingRequest.parse


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
        ([True, False], [[1, 0]]),
        ([[True], [5]], [[1], [5]]),
        ([[True, 1.0], [5]], [[1, 1], [5]]),
        ([[], [5]], [[], [5]]),
        ([-1], [[-1]]),
    ],
)
def test_the_four_forms_of_input(given: object, inputs: list[Any]) -> None:
    prompts = read(input=given).given
    assert prompts == inputs
    assert isinstance(prompts, list)
    if given and inputs and not isinstance(inputs[0], str):
        assert all(type(number) is int for ids in prompts for number in ids)


@pytest.mark.parametrize(
    "given",
    [
        *(5, True, {"a": 1}, ["a", 1], [1, "2"], [[1], "a"], [[1], 2], [["a"]], [[[1]]], [None], [["a", 1]]),
        *([1.5], [[1.5]], [[1], [2, 1.5]], [[1, True, 0.5]]),
    ],
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
    options = request.options(Settings())
    assert options.vectors.dimensions is None
    assert options.vectors.normalize is None
    assert options.truncate_prompt_tokens is None
    assert options.add_special_tokens


@pytest.mark.parametrize("name", sorted(EmbeddingRequest.model_fields.keys() - {"input"}))
def test_null_means_absent(name: str) -> None:
    assert read(input="a", **{name: None}) == read(input="a")


def test_unknown_fields_are_ignored() -> None:
    assert read(input="a", stream=True, instruction="query") == read(input="a")


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
        ("use_activation", 2, "bool_parsing"),
        ("truncation_side", "middle", "literal_error"),
        ("padding", "longest", "literal_error"),
        ("truncate_prompt_tokens", 1.5, "int_from_float"),
        ("request_id", 5, "string_type"),
        ("priority", "high", "int_parsing"),
        ("priority", 2**63, "less_than"),
        ("cache_salt", 5, "string_type"),
        ("mm_processor_kwargs", "a", "dict_type"),
        ("task", 5, "string_type"),
        ("prompt_name", 5, "string_type"),
        ("input_type", 5, "string_type"),
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


def test_what_a_body_has_in_place_of_its_input_is_told() -> None:
    with pytest.raises(SchemaError) as caught:
        read(model="m", inputs=["a text"], **{"k" * 300: 1})
    message = str(caught.value)
    assert "'msg': 'Field required', 'input': \"['model', 'inputs', 'kkk" in message
    assert "a text" not in message
    assert "k" * 31 not in message


def test_of_what_is_no_json_nothing_is_repeated() -> None:
    with pytest.raises(SchemaError, match="json_invalid") as caught:
        parse("application/json", b'{"input": "a text')
    assert "'input'" not in str(caught.value)


def test_long_values_are_cut() -> None:
    with pytest.raises(SchemaError) as caught:
        read(input="a", encoding_format="y" * 5000)
    assert "y" * 200 in str(caught.value)
    assert "y" * 201 not in str(caught.value)
    with pytest.raises(SchemaError) as caught:
        read(input=[["word" * 100] * 100] * 10)
    assert len(str(caught.value)) < 600


def test_at_most_ten_problems_are_listed() -> None:
    fields = dict.fromkeys(EmbeddingRequest.model_fields.keys() - CHAT_ONLY - {"messages"}, ("wrong", 1))
    with pytest.raises(SchemaError, match=f"^{len(fields)} validation errors:") as caught:
        read(**fields)
    assert len(fields) > 10
    assert str(caught.value).count("'loc'") == 10


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "empty document"),
        (b"{", "unexpected end of data"),
        (b"nonsense", "JSON decode error"),
        (b"\xff", "not valid UTF-8"),
        (b'{"input": "\xff"}', "not valid UTF-8"),
        ('{"input": "a"}'.encode("utf-16"), "not valid UTF-8"),
        (b'{"input": "\\ud800"}', "lone surrogate"),
        (b'{"input": "\\udc00"}', "lone surrogate"),
        (b'{"input": "\\ud800\\u0041"}', "lone surrogate"),
        (b'{"input": [NaN]}', "expected a JSON value"),
        (b'{"input": [-Infinity]}', "JSON decode error"),
        (b'{"input": [1e400]}', "number is infinity"),
        (b'{"input": "a"} {}', "after document"),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "depth limit exceeded"),
        (b'{"input": "a\nb"}', "control character"),
    ],
)
def test_bad_json(body: bytes, what: str) -> None:
    with pytest.raises(SchemaError, match="json_invalid") as caught:
        parse("application/json", body)
    assert caught.value.param == "body"
    assert what in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'\xef\xbb\xbf{"input": "a"}', "a"),
        (b'{"input": "a", "input": "b"}', "b"),
        (b'{"input": "a\\u0000b"}', "a\0b"),
        ('{"input": "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}"}'.encode(), "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}"),
        (b'{"input": "\\ud83d\\ude80"}', "\N{ROCKET}"),
    ],
)
def test_legal_json_that_looks_odd(body: bytes, text: str) -> None:
    assert parse("application/json", body).given == [text]


def test_deep_nesting_in_a_field_is_told_in_short() -> None:
    deep: object = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(SchemaError) as caught:
        read(input=deep, priority=deep)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("body", [b"[]", b'"a"', b"5", b"null"])
def test_the_body_must_be_an_object(body: bytes) -> None:
    with pytest.raises(SchemaError, match="dict_type") as caught:
        parse("application/json", body)
    assert caught.value.param == "body"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_content_type_may_have_parameters(content_type: str) -> None:
    assert parse(content_type, b'{"input": "a"}').given == ["a"]


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data; boundary=x", "application/jsonl"])
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(SchemaError, match="Only 'application/json' is allowed") as caught:
        parse(content_type, b'{"input": "a"}')
    assert caught.value.param is None


USER = {"role": "user", "content": "hello"}
PARTS = {"role": "user", "content": ["a", {"type": "text"}], "name": "x"}


@pytest.mark.parametrize("field", ["input", "messages"])
@pytest.mark.parametrize(
    ("given", "conversations"),
    [
        ([USER], [[USER]]),
        ([USER, {"role": "assistant"}], [[USER, {"role": "assistant"}]]),
        ([[USER], [USER, USER]], [[USER], [USER, USER]]),
        ([[USER], []], [[USER], []]),
        ([PARTS], [[PARTS]]),
    ],
)
def test_chat_messages_come_in_either_field(field: str, given: list[Any], conversations: list[Any]) -> None:
    prompts = read(**{field: given}).given
    assert isinstance(prompts, Conversations)
    assert prompts.param == field
    assert prompts.each == conversations
    assert len(prompts) == len(conversations)


@pytest.mark.parametrize("field", ["input", "messages"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"content": "a"}], "Message 0 should have a role"),
        ([USER, {"role": 5}], "Message 1 should have a role"),
        ([USER, {"role": "user", "content": 5}], "Message 1 should have a content"),
        ([USER, {"role": "user", "content": [5]}], "Message 1 should have a content"),
        ([USER, "a"], "Message 1 should be an object"),
        ([USER, [USER]], "Message 1 should be an object"),
        ([[USER], [USER, {}]], "Message 1 of conversation 1 should have a role"),
        ([[USER], USER], "Conversation 1 should be a list"),
        ([[USER], 5], "Conversation 1 should be a list"),
    ],
)
def test_other_messages_are_refused(field: str, given: object, words: str) -> None:
    with pytest.raises(SchemaError, match=words) as caught:
        read(**{field: given})
    assert caught.value.param == f"body.{field}"


@pytest.mark.parametrize("given", [5, "a", ["a"], [5], [[]], {"role": "user"}])
def test_what_is_no_message_is_refused(given: object) -> None:
    with pytest.raises(SchemaError, match="Input should be a list of messages") as caught:
        read(messages=given)
    assert caught.value.param == "body.messages"


def test_an_empty_list_of_messages_holds_no_conversation() -> None:
    assert len(read(messages=[]).given) == 0


def test_input_wins_over_messages() -> None:
    assert read(messages=[USER], input="a").given == ["a"]
    assert read(messages="nonsense", input="a").given == ["a"]
    assert read(messages=[USER], input=None) == read(messages=[USER])


def test_fields_of_chat_are_looked_at_only_beside_messages() -> None:
    wrong = {"add_generation_prompt": "x", "chat_template": 5, "chat_template_kwargs": 5, "media_io_kwargs": 5}
    assert read(input="a", **wrong) == read(input="a")
    for body in ({"messages": [USER]}, {"input": [[USER]]}):
        with pytest.raises(SchemaError, match="4 validation errors"):
            read(**body, **wrong)
        with pytest.raises(
            InvalidInput, match=r"continue_final_message.*\(parameter=continue_final_message, value=True"
        ):
            read(**body, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("given", [5, [], {"image": 5}, {"image": {}, "audio": []}])
def test_options_of_media_are_an_object_of_objects(given: object) -> None:
    read(messages=[USER], media_io_kwargs={"image": {"mode": 5}, "audio": {}})
    with pytest.raises(SchemaError, match=r"^1 validation errors:\n.*dict_type") as caught:
        read(messages=[USER], media_io_kwargs=given)
    assert caught.value.param == "body.media_io_kwargs"


def test_special_tokens_are_left_to_the_template_of_a_chat() -> None:
    chat = {"messages": [USER]}
    for body, default in (({"input": "a"}, True), (chat, False), ({"input": [USER]}, False)):
        assert read(**body).options(Settings()).add_special_tokens is default
        for value in (True, False):
            assert read(**body, add_special_tokens=value).options(Settings()).add_special_tokens is value


@pytest.mark.parametrize(
    ("given", "side"),
    [(None, TruncationSide.MODEL), ("left", TruncationSide.LEFT), ("right", TruncationSide.RIGHT)],
)
def test_the_side_that_is_cut(given: str | None, side: TruncationSide) -> None:
    assert read(input="a", truncation_side=given).options(Settings()).truncation_side is side


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 0),
        ({"padding": "do_not_pad"}, 0),
        ({"padding": "max_length"}, 256),
        ({"padding": "max_length", "truncate_prompt_tokens": -1}, 256),
        ({"padding": "max_length", "truncate_prompt_tokens": 7}, 7),
    ],
)
def test_padding_counts_up_to_the_limit(fields: dict[str, Any], tokens: int) -> None:
    recipe = Recipe(256, (Pooling.MEAN,), normalize=True, dimension=384, vocab_size=100)
    assert read(input="a", **fields).padded_to(recipe) == tokens


@pytest.mark.parametrize("salt", ["a", "s" * 128, "naïve salt"])
def test_salts(salt: str) -> None:
    assert read(input="a", cache_salt=salt).cache_salt == salt


@pytest.mark.parametrize("salt", ["", "s" * 129, "a@b", "a/b", "a\\b", "a\0b"])
def test_salts_that_vllm_refuses(salt: str) -> None:
    with pytest.raises(InvalidInput, match=r"`cache_salt` must have .* \(parameter=cache_salt, value=") as caught:
        read(input="a", cache_salt=salt)
    assert caught.value.param == "cache_salt"


def test_media_cannot_be_processed() -> None:
    assert read(input="a", mm_processor_kwargs={}) == read(input="a")
    with pytest.raises(
        InvalidInput, match=r"must be empty.* \(parameter=mm_processor_kwargs, value=\{'a': 1\}\)"
    ) as caught:
        read(input="a", mm_processor_kwargs={"a": 1})
    assert caught.value.param == "mm_processor_kwargs"


@pytest.mark.parametrize("priority", [-(2**63), 0, 2**63 - 1, "7", 3.0])
def test_priorities(priority: object) -> None:
    assert read(input="a", priority=priority).priority == int(priority)  # type: ignore[call-overload] # of both kinds


def test_a_pooling_task_is_one_of_a_list() -> None:
    body = orjson.dumps({"input": "a", "task": "retrieval.query"})
    with pytest.raises(SchemaError, match="literal_error") as caught:
        PoolingRequest.parse("application/json", body)
    assert caught.value.param == "body.task"


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b'{"input": [1, 2, 3, 4]}', 5),
        (b'{"input": [[], [], []]}', 7),
        (b'{"input": [[[[1]]], [[[2]]]]}', 9),
        (b'{"input": ["a", "b"], "task": {"a": {"b": 1}}}', 6),
        (rb'{"input": "a,[{,\",\\", "user": "\\\",,,"}', 2),
        (rb'{"input": ["\\", "\\\",,", ",,,,,,"]}', 4),
        (b'{"input": ["' + b'", "' * 20 + b'"]}', 22),
    ],
)
def test_values_are_counted_before_they_are_made(body: bytes, values: int) -> None:
    orjson.loads(body)
    for most in range(values, values + 5):
        assert not isinstance(outcome(body, most), InvalidInput)
    for most in range(1, values):
        error = outcome(body, most)
        assert isinstance(error, InvalidInput)
        assert f"more than {most} values (--max-body-values)" in str(error)


def outcome(body: bytes, most_values: int) -> object:
    try:
        return EmbeddingRequest.parse("application/json", body, most_values)
    except (InvalidInput, SchemaError) as error:
        return error


def test_the_largest_request_is_read_in_a_moment() -> None:
    ids, texts = [*range(30_000)] * 10, ["text"] * 100_000
    for given, expected in ((ids, [ids]), ([ids], [ids]), ([[5]] * 100_000,) * 2, (texts,) * 2):
        body = orjson.dumps({"input": given})
        began_s = time.process_time()
        prompts = parse("application/json", body).given
        assert time.process_time() - began_s < 1  # about 0.02: one pydantic object for each would take ten times that
        assert isinstance(prompts, list)
        assert [row.tolist() if isinstance(row, np.ndarray) else row for row in prompts] == expected
        assert isinstance(prompts, list)
        assert [each if isinstance(each, str) else list(each) for each in prompts] == expected


@pytest.mark.parametrize("value", [True, False])
def test_normalize_has_an_alias(value: bool) -> None:
    for fields in ({"normalize": value}, {"use_activation": value}, {"normalize": value, "use_activation": value}):
        assert read(input="a", **fields).options(Settings()).vectors.normalize is value
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
        options = read(input="a", encoding_format=form, embed_dtype="float16").options(Settings())
        assert options.vectors.dtype is expected


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        (Settings(), LongInputs.ERROR),
        (Settings(auto_truncate=True), LongInputs.TRUNCATE),
        (Settings(long_inputs=LongInputsName.TRUNCATE), LongInputs.TRUNCATE),
        (Settings(long_inputs=LongInputsName.CHUNK), LongInputs.CHUNK),
    ],
)
def test_the_server_says_what_becomes_of_long_inputs(settings: Settings, policy: LongInputs) -> None:
    options = read(input="a", truncate_prompt_tokens=4).options(settings)
    assert (options.truncate_prompt_tokens, options.long_inputs) == (4, policy)
    assert read(input="a").options(settings).truncate_prompt_tokens is None
