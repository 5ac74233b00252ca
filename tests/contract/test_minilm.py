"""The rules that show best with the real all-MiniLM-L6-v2: its files hold traps of their own."""

from __future__ import annotations

from typing import Any

import httpx2
import numpy as np
import pytest

from .case import covers

pytestmark = pytest.mark.integration

LENGTH = 256
"""Of its sentence_bert_config.json; config.json says 512, and tokenizer.json cuts at 128 and pads to it."""


@covers("E-MOD-01", "E-MOD-02", "E-POOL-01")
def test_its_card(serving: Any) -> None:
    (card,) = httpx2.get(f"{serving.url}/v1/models").json()["data"]
    expected = {
        "id": "all-MiniLM-L6-v2",
        "max_model_len": LENGTH,
        "dimension": 384,
        "pooling": "mean",
        "normalize": True,
    }
    assert expected.items() <= card.items()


@covers("E-TRUNC-01", "E-TRUNC-12")
@pytest.mark.parametrize("words", [1, 100, 127, 200, LENGTH - 2])
def test_inputs_up_to_its_length_are_read_whole(serving: Any, words: int) -> None:
    reply = serving.post({"input": ["word " * words, "word"]})
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == words + 2 + 3
    assert reply.headers["x-truncated-inputs"] == "0"


@covers("E-TRUNC-01")
def test_one_token_more_is_refused(serving: Any) -> None:
    error = serving.post({"input": "word " * (LENGTH - 1)}).json()["error"]
    assert f"maximum context length is {LENGTH} tokens" in error["message"]
    assert f"(parameter=input_tokens, value={LENGTH + 1})" in error["message"]
    assert (error["code"], error["param"]) == (400, "input_tokens")


@covers("E-TRUNC-05", "E-TRUNC-06", "E-TRUNC-14")
def test_a_cut_input_keeps_its_specials(serving: Any) -> None:
    reply = serving.post({"input": "word " * 1000, "truncate_prompt_tokens": -1})
    assert reply.json()["usage"]["prompt_tokens"] == LENGTH
    np.testing.assert_allclose([reply.json()["data"][0]["embedding"]], serving.embed("word " * (LENGTH - 2)), atol=1e-5)


@covers("E-INP-10", "E-INP-11")
def test_an_empty_text_is_its_specials(serving: Any) -> None:
    reply = serving.post({"input": ""})
    assert reply.json()["usage"]["prompt_tokens"] == 2
    np.testing.assert_allclose([reply.json()["data"][0]["embedding"]], serving.embed([[101, 102]]), atol=1e-5)


@covers("E-CHAT-03")
def test_it_has_no_chat_template(serving: Any) -> None:
    error = serving.post({"messages": [{"role": "user", "content": "hi"}]}).json()["error"]
    assert error["message"].startswith("As of transformers v4.44, default chat template is no longer allowed")
    assert (error["code"], error["type"]) == (400, "BadRequestError")


@covers("E-PROMPT-04", "E-PROMPT-02")
def test_it_has_no_prompts(serving: Any) -> None:
    for word in ("query", "search_document", "classification", ""):
        reply = serving.post({"input": "the queue", "input_type": word})
        assert reply.json()["usage"]["prompt_tokens"] == 4
    error = serving.post({"input": "the queue", "prompt_name": "query"}).json()["error"]
    assert (error["code"], error["param"]) == (400, "prompt_name")


@covers("E-TOK-01", "E-TOK-03", "E-TOK-07")
def test_its_tokens(serving: Any) -> None:
    asked = {"prompt": "Hello world", "return_token_strs": True}
    answer = httpx2.post(f"{serving.url}/tokenize", json=asked).json()
    tokens = [101, 7592, 2088, 102]
    strings = ["[CLS]", "hello", "world", "[SEP]"]
    assert answer == {"count": 4, "max_model_len": LENGTH, "tokens": tokens, "token_strs": strings}
    text = httpx2.post(f"{serving.url}/detokenize", json={"tokens": tokens}).json()
    assert text == {"prompt": "[CLS] hello world [SEP]"}
