"""Texts with a prompt before each: their tokens, and how many of them are the prompt's."""

from __future__ import annotations

import json

import pytest

from embedstream.shared import tokenization
from embedstream.shared.errors import InvalidInput
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.tokenization import TextTokenizer

RECIPE = Recipe(8, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=100)


@pytest.fixture
def tokenizer(wordpiece_json: str) -> TextTokenizer:
    return TextTokenizer(wordpiece_json, RECIPE)


def without_template(wordpiece_json: str) -> TextTokenizer:
    return TextTokenizer(json.dumps(json.loads(wordpiece_json) | {"post_processor": None}), RECIPE)


@pytest.mark.parametrize("group_chars", [1, 12, 1000])
@pytest.mark.parametrize("limit", [None, 5])
def test_the_prompt_is_put_before_each_text(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, group_chars: int, limit: int | None
) -> None:
    monkeypatch.setattr(tokenization, "GROUP_CHARS", group_chars)
    texts = ["abc", "", "queue the", "d"]
    tokens = tokenizer.encode(texts, prompt="the ", truncate_to=limit)
    whole = tokenizer.encode(["the " + text for text in texts], truncate_to=limit)
    assert tokens.ids.tolist() == whole.ids.tolist()
    assert tokens.lengths.tolist() == whole.lengths.tolist()


def test_the_prompt_counts_for_a_group(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "GROUP_CHARS", 10)
    assert [list(group) for _, group in tokenization._groups(["a", "b", "c"], 4)] == [["a", "b"], ["c"]]


def test_a_bad_text_is_told_without_the_prompt(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidInput, match=r"index 1 .* at character 0\.$"):
        tokenizer.encode(["a", "\ud800"], prompt="the ")


def test_a_prompt_may_make_texts_unreadable() -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
    tokenizer = TextTokenizer(json.dumps({"version": "1.0", "model": words, "added_tokens": []}), RECIPE)
    assert not dict(tokenizer.unreadable(["a", "b"]))
    assert sorted(dict(tokenizer.unreadable(["a", "b"], 3, "x"))) == [3, 4]


@pytest.mark.parametrize(
    ("prompt", "special", "length"),
    [
        ("the queue", True, 3),  # [CLS] and two words
        ("the queue", False, 2),
        ("the [SEP]", False, 1),  # as sentence-transformers, whose rule looks at the last token alone
        ("the queue the queue the queue the queue", True, 7),
        ("the queue the queue the queue the queue", False, 8),
        ("", True, 1),
        ("", False, 0),
    ],
)
def test_how_many_tokens_are_the_prompts(tokenizer: TextTokenizer, prompt: str, special: bool, length: int) -> None:
    assert tokenizer.prompt_length(prompt, add_special_tokens=special, most=RECIPE.max_length) == length


def test_a_tokenizer_that_adds_nothing(wordpiece_json: str) -> None:
    plain = without_template(wordpiece_json)
    assert plain.prompt_length("the queue", add_special_tokens=True, most=8) == 2
    assert plain.prompt_length("the [SEP]", add_special_tokens=True, most=8) == 1
