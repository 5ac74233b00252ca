from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from tests.api.conftest import WORDS, StubProducer
from tests.api.test_chat import MORE, USER, serve_chat

from embedstream.api import create_app
from embedstream.producer.prepare import MAX_WHOLE_CHARS
from embedstream.shared.settings import Settings

CLS, SEP, A, B, C = (WORDS.index(word) for word in ("[CLS]", "[SEP]", "a", "b", "c"))


async def posted(client: httpx2.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


async def refused(client: httpx2.AsyncClient, path: str, **body: Any) -> tuple[int, str, str | None, str]:
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return response.status_code, error["type"], error["param"], error["message"]


async def test_a_text(client: httpx2.AsyncClient) -> None:
    answer = {"count": 4, "max_model_len": 10, "tokens": [CLS, A, B, SEP], "token_strs": None}
    assert await posted(client, "/tokenize", prompt="a b") == answer
    for name in ("tiny", "owner/tiny", "", None):
        assert await posted(client, "/tokenize", prompt="a b", model=name) == answer
    strings = answer | {"token_strs": ["[CLS]", "a", "b", "[SEP]"]}
    assert await posted(client, "/tokenize", prompt="a b", return_token_strs=True) == strings
    plain = {"count": 2, "max_model_len": 10, "tokens": [A, B], "token_strs": None}
    assert await posted(client, "/tokenize", prompt="a b", add_special_tokens=False) == plain
    assert (await posted(client, "/tokenize", prompt="", add_special_tokens=False))["tokens"] == []


async def test_no_text_is_too_long(client: httpx2.AsyncClient) -> None:
    n = 120_000  # above two pieces, and tokenised in a thread
    answer = await posted(client, "/tokenize", prompt="a " * n, return_token_strs=True)
    assert answer["tokens"] == [CLS, *[A] * n, SEP]
    assert answer["token_strs"] == ["[CLS]", *["a"] * n, "[SEP]"]
    assert answer["count"] == n + 2
    text = (await posted(client, "/detokenize", tokens=[A] * n))["prompt"]
    assert text == " ".join(["a"] * n)


async def test_a_text_that_would_take_the_memory_of_the_process(client: httpx2.AsyncClient) -> None:
    status, kind, param, message = await refused(client, "/tokenize", prompt="a" * (MAX_WHOLE_CHARS + 1))
    assert (status, kind, param) == (400, "BadRequestError", "prompt")
    assert message == f"The text has {MAX_WHOLE_CHARS + 1} characters; at most {MAX_WHOLE_CHARS} are taken."


async def test_large_texts_wait_for_one_another(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, producer: StubProducer
) -> None:
    assert producer.fleet.served is not None
    tokenizer, inside, most = producer.fleet.served.tokenizer, 0, 0
    encode = tokenizer.encode

    def watched(texts: list[str], **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            return encode(texts, **options)
        finally:
            inside -= 1

    monkeypatch.setattr(tokenizer, "encode", watched)
    answers = await asyncio.gather(*(posted(client, "/tokenize", prompt="a " * 150_000) for _ in range(4)))
    assert [answer["count"] for answer in answers] == [150_002] * 4
    assert most == 1


async def test_a_conversation(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    serve_chat(producer, default="{{ messages[0].content }}{% if add_generation_prompt %} c{% endif %}")
    for extra, tokens in (
        ({}, [A, B, C]),
        ({"add_generation_prompt": False}, [A, B]),
        ({"continue_final_message": True}, [A, B]),
        ({"add_special_tokens": True}, [CLS, A, B, C, SEP]),
    ):
        assert (await posted(client, "/tokenize", messages=[USER], **extra))["tokens"] == tokens
    assert (await posted(client, "/tokenize", messages=[USER], prompt="c"))["tokens"] == [CLS, C, SEP]
    status, kind, param, message = await refused(client, "/tokenize", messages=[[USER], [MORE]])
    assert (status, kind, param) == (400, "Bad Request", "body.messages")
    assert "one conversation" in message
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert (await refused(client, "/tokenize", messages=[USER], **both))[:3] == (
        *(400, "BadRequestError"),
        "continue_final_message",
    )


async def test_a_conversation_needs_a_template(client: httpx2.AsyncClient) -> None:
    for messages in ([USER], []):
        assert (await refused(client, "/tokenize", messages=messages))[:3] == (400, "BadRequestError", "messages")


async def test_token_ids_back_to_text(client: httpx2.AsyncClient) -> None:
    for ids, text in (([CLS, A, B, SEP], "[CLS] a b [SEP]"), ([], ""), ([3.0, True], "a [SEP]")):
        assert await posted(client, "/detokenize", tokens=ids) == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param", "word"),
    [
        ("/tokenize", {}, "body.prompt", "missing"),
        ("/tokenize", {"prompt": 5}, "body.prompt", "string_type"),
        ("/tokenize", {"prompt": ["a"]}, "body.prompt", "string_type"),
        ("/tokenize", {"prompt": "a", "return_token_strs": "perhaps"}, "body.return_token_strs", "bool_parsing"),
        ("/tokenize", {"messages": "a"}, "body.messages", "messages_type"),
        ("/detokenize", {}, "body.tokens", "missing"),
        ("/detokenize", {"tokens": 5}, "body.tokens", "list_type"),
        ("/detokenize", {"tokens": ["a"]}, "body.tokens", "int_type"),
        ("/detokenize", {"tokens": [[1]]}, "body.tokens", "int_type"),
        ("/detokenize", {"tokens": [1.5]}, "body.tokens", "int_from_float"),
        ("/detokenize", {"tokens": [1, -1]}, "body.tokens", "greater_than_equal"),
        ("/detokenize", {"model": 5, "tokens": []}, "body.model", "string_type"),
    ],
)
async def test_wrong_forms(client: httpx2.AsyncClient, path: str, body: dict[str, Any], param: str, word: str) -> None:
    status, kind, where, message = await refused(client, path, **body)
    assert (status, kind, where) == (400, "Bad Request", param)
    assert word in message


async def test_ids_out_of_the_vocabulary(client: httpx2.AsyncClient) -> None:
    for ids in ([len(WORDS)], [2**63]):
        status, kind, param, message = await refused(client, "/detokenize", tokens=ids)
        assert (status, kind, param) == (400, "BadRequestError", "tokens")
        assert f"Token id {ids[0]} is out of vocabulary" in message


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_an_unknown_model(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> None:
    status, kind, param, message = await refused(client, path, model="other", **body)
    assert (status, kind, param) == (404, "NotFoundError", "model")
    assert message.startswith("The model `other` does not exist.")


async def test_the_tokenizer_outlives_its_consumers(
    producer: StubProducer, connect_to: Callable[[Starlette], httpx2.AsyncClient]
) -> None:
    producer.fleet.reason = "No consumer is alive."
    async with connect_to(create_app(Settings(scale_from_zero_s=5, model="tiny"), producer)) as client:
        assert (await posted(client, "/tokenize", prompt="a"))["count"] == 3
        producer.fleet.served = None
        status, _, _, message = await refused(client, "/tokenize", prompt="a")
        assert (status, message) == (503, "No consumer has told the model's tokenizer yet.")
