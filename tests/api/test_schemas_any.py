"""Whatever JSON a body holds, the answer is a request or a refusal of ours, never another exception."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedstream.api.chat import texts_of
from embedstream.api.errors import SchemaError
from embedstream.api.inputs import Conversations
from embedstream.api.schemas import Body, ChatFields, EmbeddingRequest, PoolingRequest
from embedstream.api.tokenize import DetokenizeRequest, TokenizeRequest
from embedstream.producer import Options
from embedstream.shared.cards import ChatFormat
from embedstream.shared.errors import InvalidInput, NotServed
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.settings import Settings

T = TypeVar("T")

KINDS: list[type[Body]] = [EmbeddingRequest, PoolingRequest, TokenizeRequest, DetokenizeRequest]
RECIPE = Recipe(256, (Pooling.MEAN,), normalize=True, dimension=8, vocab_size=100)
CHAT = ChatFormat({"default": "{% for m in messages %}{{ m.content }}{{ m.name }}{% endfor %}"}, {})
ON = Settings(trust_request_chat_template=True)

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=20)
words = st.sampled_from(
    ["role", "content", "type", "text", "image_url", "user", "left", "max_length", "embed", "float", "8", "a@b", "{{"]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.text(max_size=5)},
        optional={
            "content": st.none()
            | st.text()
            | st.lists(st.text() | st.dictionaries(words, scalars | words), max_size=3),
            "name": values,
        },
    ),
    max_size=3,
)
conversations = messages | st.lists(messages, max_size=3)
ids = st.lists(numbers | st.booleans(), max_size=5)
inputs = st.one_of(values, st.text(), ids, st.lists(ids, max_size=3), conversations)
names = sorted({name for kind in KINDS for name in kind.model_fields} | {"unknown"})
forms = st.fixed_dictionaries(
    {}, optional={"input": inputs, "messages": conversations, "prompt": st.text(), "tokens": ids}
)
fields = st.dictionaries(st.sampled_from(names), values, max_size=5)
bodies = st.builds(lambda some, form: some | form, fields, forms)


def outcome(work: Callable[[], T]) -> T | Exception:
    """What comes of it: a result, or a refusal of ours."""
    try:
        return work()
    except (SchemaError, InvalidInput, NotServed) as error:
        return error


def read(kind: type[Body], data: bytes) -> Body | None:
    """The request, or None for a refusal that is fit to be sent."""
    came = outcome(lambda: kind.parse("application/json", data))
    if isinstance(came, Body):
        return came
    assert len(str(came)) < 10_000
    orjson.dumps({"message": str(came)})
    return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(body=bodies | values)
def test_any_json(kind: type[Body], body: Any) -> None:
    request = read(kind, json.dumps(body).encode())
    if isinstance(request, EmbeddingRequest | PoolingRequest):
        request.padded_to(RECIPE)
        assert len(request.given) >= 0
        came = outcome(lambda: request.options(Settings()))
        assert isinstance(came, Options) or "task" in str(came)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_bytes(kind: type[Body], data: bytes) -> None:
    read(kind, data)


@settings(max_examples=200)
@given(
    given_messages=conversations,
    template=st.none() | st.text(max_size=20) | st.sampled_from(["{{ messages }}", "{% for m in messages[0] %}"]),
    variables=st.dictionaries(st.text(max_size=8) | words, values, max_size=3),
    unfinished=st.booleans(),
)
def test_any_conversation(
    given_messages: list[Any], template: str | None, variables: dict[str, Any], unfinished: bool
) -> None:
    body = {"messages": given_messages, "chat_template": template, "chat_template_kwargs": variables}
    request = read(EmbeddingRequest, json.dumps(body | {"continue_final_message": unfinished}).encode())
    if request is None:
        return
    assert isinstance(request, ChatFields)
    assert isinstance(request, EmbeddingRequest)
    assert isinstance(request.given, Conversations)
    prompts = request.given
    texts = outcome(lambda: asyncio.run(texts_of(prompts, request, CHAT, ON)))
    if isinstance(texts, Exception):
        assert len(str(texts)) < 1_000
    else:
        assert len(texts) == len(prompts)
