from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from tests.api.conftest import StubProducer, served_model

from embedstream.api import create_app
from embedstream.shared.cards import ChatFormat
from embedstream.shared.keys import Keys
from embedstream.shared.settings import Settings

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}g{% endif %}{{ more }}"
STRICT = """{% for m in messages %}
{% if m.role != 'user' %}{{ raise_exception('Only users may speak') }}{% endif %}
{% endfor %}"""
NO_TEMPLATE = "As of transformers v4.44, default chat template is no longer allowed"

USER = {"role": "user", "content": "a b"}
MORE = {"role": "user", "content": "c"}


def serve_chat(producer: StubProducer, **templates: str) -> None:
    """Give the served model chat templates."""
    served = producer.fleet.served
    assert served is not None
    card = replace(
        served.card, chat=ChatFormat(templates or {"default": TEMPLATE}, {"bos_token": "[CLS]"}), fingerprint=b""
    )
    producer.fleet.served = replace(served, card=card)


async def texts(client: httpx2.AsyncClient, producer: StubProducer, **body: Any) -> list[str]:
    """What is tokenised for a request."""
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    return [str(text) for text in producer.runs[-1].inputs]


async def refused(client: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/embeddings", json=body)
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError"), response.text
    return error


@pytest.mark.parametrize("field", ["messages", "input"])
async def test_a_conversation_is_one_input_and_a_batch_is_several(
    client: httpx2.AsyncClient, producer: StubProducer, field: str
) -> None:
    serve_chat(producer)
    assert await texts(client, producer, **{field: [USER, MORE]}) == ["a b c "]
    assert await texts(client, producer, **{field: [[USER], [USER, MORE]]}) == ["a b ", "a b c "]


async def test_the_tokens_are_those_of_the_text(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer)
    for extra, tokens in (({}, 2), ({"add_special_tokens": True}, 4)):
        response = await client.post("/v1/embeddings", json={"messages": [USER]} | extra)
        assert response.json()["usage"]["prompt_tokens"] == tokens
    plain = await client.post("/v1/embeddings", json={"input": "a b ", "add_special_tokens": False})
    chat = await client.post("/v1/embeddings", json={"messages": [USER]})
    assert chat.json()["data"] == plain.json()["data"]


async def test_options_reach_the_template(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer)
    options = {"add_generation_prompt": True, "chat_template_kwargs": {"more": "d"}, "media_io_kwargs": {"image": {}}}
    assert await texts(client, producer, messages=[USER], **options) == ["a b gd"]
    assert await texts(client, producer, messages=[USER], continue_final_message=True) == ["a b"]


async def test_parts_of_text_are_joined(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer)
    parts = [
        "a",
        {"type": "text", "text": "b"},
        {"type": "input_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert await texts(client, producer, messages=[{"role": "user", "content": parts}]) == ["a\nb\nc\nd "]
    assert await texts(client, producer, messages=[{"role": "user"}, MORE]) == [" c "]
    serve_chat(producer, default="{% for m in messages %}{% for p in m.content %}{{ p.text }} {% endfor %}{% endfor %}")
    assert await texts(client, producer, messages=[{"role": "user", "content": parts}, USER]) == ["a b c d a b "]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "http://x"}}, "At most 0 image(s) may be provided"),
        ({"image_url": "http://x"}, "At most 0 image(s) may be provided"),
        ({"type": "input_audio", "input_audio": {}}, "At most 0 audio(s) may be provided"),
        ({"type": "video_url"}, "At most 0 video(s) may be provided"),
        ({"type": "smell"}, "(parameter=messages, value=smell)"),
        ({"type": ["text"]}, "must be a string or have the type `text`"),
        ({}, "must be a string or have the type `text`"),
        ({"type": "text"}, "must have a string as its `text`"),
        ({"type": "text", "text": 5}, "must have a string as its `text`"),
    ],
)
async def test_other_parts_are_refused(
    client: httpx2.AsyncClient, producer: StubProducer, part: dict[str, Any], words: str
) -> None:
    serve_chat(producer)
    error = await refused(client, messages=[{"role": "user", "content": ["a", part]}])
    assert words in error["message"]
    assert error["param"] == "messages"


@pytest.mark.parametrize("field", ["messages", "input"])
async def test_without_a_template_the_client_is_told_in_vllms_words(client: httpx2.AsyncClient, field: str) -> None:
    error = await refused(client, **{field: [USER]})
    assert error["message"].startswith(NO_TEMPLATE)
    assert error["param"] == field


async def test_nothing_to_say(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer)
    assert "the list of messages is empty" in (await refused(client, messages=[]))["message"]
    assert "index 1 has no message" in (await refused(client, messages=[[USER], []]))["message"]
    error = await refused(client, messages=[{"role": "user"}], continue_final_message=True)
    assert "last message of the conversation at index 0 is empty" in error["message"]


async def test_an_empty_text_has_no_tokens(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer, default="")
    assert "cannot be empty" in (await refused(client, messages=[USER]))["message"]


async def test_the_template_may_refuse(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer, default=STRICT)
    error = await refused(client, messages=[[USER], [{"role": "system", "content": "a"}]])
    assert error["message"] == "The chat template refuses the conversation at index 1: Only users may speak"
    serve_chat(producer, default="{{ 1 / 0 }}")
    assert "division by zero" in (await refused(client, messages=[USER]))["message"]
    serve_chat(producer, default="{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    assert "recursion" in (await refused(client, messages=[USER]))["message"]
    serve_chat(producer, default="{{ messages[0].content[:1] }}")
    error = await refused(client, messages=[USER], continue_final_message=True)
    assert "leaves out the end of the last message" in error["message"]


async def test_a_damaged_template_of_the_model(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer, default="{% if %}")
    response = await client.post("/v1/embeddings", json={"messages": [USER]})
    assert (response.status_code, response.json()["error"]["type"]) == (501, "NotImplementedError")
    assert "The model's chat template cannot be read" in response.text


async def test_requests_bring_no_templates(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer)
    error = await refused(client, messages=[USER], chat_template="{{ 1 }}")
    assert "--trust-request-chat-template is not set" in error["message"]
    assert error["param"] == "chat_template"
    for name in ("chat_template", "tokenize", "messages"):
        error = await refused(client, messages=[USER], chat_template_kwargs={name: "x"})
        assert error["message"] == f"Found unexpected chat template kwargs from request: {name}."


async def test_templates_of_trusted_requests(
    producer: StubProducer, connect_to: Callable[[Starlette], httpx2.AsyncClient]
) -> None:
    settings = Settings(trust_request_chat_template=True, max_chat_chars=20, chat_timeout_s=0.2)
    async with connect_to(create_app(settings, producer)) as client:
        given = "{{ bos_token }}{{ messages[0].content }}"
        assert await texts(client, producer, messages=[USER], chat_template=given) == ["a b"]
        serve_chat(producer, default="d", other="e")
        assert await texts(client, producer, messages=[USER], chat_template=given) == ["[CLS]a b"]
        assert await texts(client, producer, messages=[USER], chat_template="other") == ["e"]
        for template, words in (
            ("{% if %}", "template of the request cannot be read"),
            ("a" * 100_001, "has 100001 characters; at most 100000"),
            ("{{ raise_exception('no') }}", "at index 0: no"),
            ("{% for i in range(21) %}a{% endfor %}", "more than 20 characters (--max-chat-chars)"),
            (
                "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = 1 %}{% endfor %}{% endfor %}",
                "(--chat-timeout-s)",
            ),
        ):
            error = await refused(client, messages=[USER], chat_template=template)
            assert words in error["message"]
        error = await refused(client, messages=[[USER]] * 3, chat_template="12345678")
        assert "more than 20 characters" in error["message"]  # all conversations together


async def test_a_model_with_named_templates_only(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer, rag="r", tools="t")
    error = await refused(client, messages=[USER])
    assert "name one as `chat_template` (rag, tools)" in error["message"]


async def test_chat_waits_for_the_first_consumer(
    producer: StubProducer, connect_to: Callable[[Starlette], httpx2.AsyncClient]
) -> None:
    producer.fleet.served, producer.fleet.reason = None, "No consumer is alive."
    async with connect_to(create_app(Settings(scale_from_zero_s=5, model="tiny"), producer)) as client:
        response = await client.post("/v1/embeddings", json={"messages": [USER]})
    assert response.status_code == 503
    assert "send texts" in response.json()["error"]["message"]


def test_a_served_model_has_no_template_unless_told() -> None:
    assert served_model().card.chat is None
    assert served_model().keys == Keys("ek", "tiny")


async def test_a_model_with_another_template_does_not_get_the_texts_of_this_one(
    client: httpx2.AsyncClient, producer: StubProducer
) -> None:
    serve_chat(producer)
    assert producer.fleet.served is not None
    await texts(client, producer, messages=[USER])
    assert producer.runs[-1].options.chat == producer.fleet.served.card.chat
    await texts(client, producer, input="a")
    assert producer.runs[-1].options.chat is None
