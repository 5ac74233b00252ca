from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedstream.shared import tokenization
from embedstream.shared.errors import InvalidInput, ModelLoadError
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.models import locate
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.tokenization import (
    TextTokenizer,
    Tokens,
    cut,
    finished,
)

MODEL, RIGHT, LEFT = TruncationSide.MODEL, TruncationSide.RIGHT, TruncationSide.LEFT
CLS, SEP = 101, 102
RECIPE = Recipe(max_length=256, pooling=(Pooling.MEAN,), normalize=True, dimension=384, vocab_size=30522)
LEFT_RECIPE = replace(RECIPE, truncation_side=LEFT)
MINILM = (locate("all-MiniLM-L6-v2").path / "tokenizer.json").read_text()
TOKENIZER = TextTokenizer(MINILM, RECIPE)
LEFT_TOKENIZER = TextTokenizer(MINILM, LEFT_RECIPE)
PLAIN: Tokenizer = Tokenizer.from_str(MINILM)
PLAIN.no_padding()


def word_level(single: str | None, vocabulary: Sequence[str] = ("<s>", "</s>", "w1", "w2", "w3", "W1")) -> str:
    """A tokenizer of whole words; `single` is its template, such as "<s> $A </s>"."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    specials = [{"id": ids[word], "special": True, "content": word} for word in ("<s>", "</s>")]
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if word == "$A" else {"SpecialToken": {"id": word, "type_id": 0}}
        for word in (single or "").split()
    ]
    template = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {w: {"id": w, "ids": [ids[w]], "tokens": [w]} for w in ("<s>", "</s>")},
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{**special, **common} for special in specials],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": template if single else None,
            "model": {"type": "WordLevel", "vocab": ids, "unk_token": "no such token"},
        }
    )


def rows(tokens: Tokens) -> list[list[int]]:
    bounds = tokens.offsets.tolist()
    return [tokens.ids[start:end].tolist() for start, end in pairwise(bounds)]


def test_padding_and_truncation_of_the_json_are_left_out() -> None:
    tokens = TOKENIZER.encode(["hello", "hello " * 300])
    assert tokens.lengths.tolist() == [3, 302]
    assert rows(tokens)[0] == [CLS, 7592, SEP]
    assert (tokens.ids.dtype.name, tokens.lengths.dtype.name, len(tokens)) == ("uint32", "uint32", 2)


def test_the_empty_text_is_its_special_tokens() -> None:
    assert rows(TOKENIZER.encode([""])) == [[CLS, SEP]]
    assert rows(TOKENIZER.encode(["", "a"], add_special_tokens=False)) == [[], [1037]]


def test_no_texts() -> None:
    tokens = TOKENIZER.encode([])
    assert (len(tokens), len(tokens.ids), tokens.offsets.tolist()) == (0, 0, [0])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=5), st.booleans())
def test_ids_are_those_of_the_library(texts: list[str], specials: bool) -> None:
    PLAIN.no_truncation()
    expected = [PLAIN.encode(text, add_special_tokens=specials).ids for text in texts]
    assert rows(TOKENIZER.encode(texts, add_special_tokens=specials)) == expected
    assert [rows(TOKENIZER.encode([text], add_special_tokens=specials))[0] for text in texts] == expected


@given(st.integers(3, 12), st.integers(0, 15), st.sampled_from(["right", "left"]), st.booleans())
def test_the_models_own_side_cuts_as_the_library_does(limit: int, words: int, side: str, specials: bool) -> None:
    PLAIN.enable_truncation(limit, direction=side)
    text = " ".join("abcdefghijklmno"[:words])
    tokenizer = TOKENIZER if side == "right" else LEFT_TOKENIZER
    tokens = tokenizer.encode([text, "a"], truncate_to=limit, add_special_tokens=specials)
    expected = [PLAIN.encode(each, add_special_tokens=specials).ids for each in (text, "a")]
    assert rows(tokens) == expected
    assert tokens.truncated == (words + 2 * specials > limit)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LEFT_TOKENIZER])
def test_an_explicit_side_slices_the_finished_sequence(tokenizer: TextTokenizer) -> None:
    whole = rows(tokenizer.encode(["a b c d"]))[0]
    assert rows(tokenizer.encode(["a b c d"], truncate_to=4, side=RIGHT)) == [whole[:4]]
    assert rows(tokenizer.encode(["a b c d"], truncate_to=4, side=LEFT)) == [whole[-4:]]
    assert rows(tokenizer.encode(["a b c d"], truncate_to=1, side=RIGHT)) == [[CLS]]


@pytest.mark.parametrize(
    ("template", "n_special", "right", "left"),
    [
        (None, 0, ["w1", "w2"], ["w2", "w3"]),
        ("$A", 0, ["w1", "w2"], ["w2", "w3"]),
        ("$A </s>", 1, ["w1", "</s>"], ["w3", "</s>"]),
        ("<s> $A", 1, ["<s>", "w1"], ["<s>", "w3"]),
    ],
)
def test_special_tokens_are_found_wherever_they_stand(
    template: str | None, n_special: int, right: list[str], left: list[str]
) -> None:
    text = word_level(template)
    ids = json.loads(text)["model"]["vocab"]
    for recipe, expected in ((RECIPE, right), (LEFT_RECIPE, left)):
        tokenizer = TextTokenizer(text, recipe)
        assert tokenizer.n_special == n_special
        assert rows(tokenizer.encode(["w1 w2 w3"], truncate_to=2)) == [[ids[word] for word in expected]]


def test_what_the_tokenizer_refuses_is_the_callers_error() -> None:
    tokenizer = TextTokenizer(word_level("<s> $A </s>"), RECIPE)  # it has no token for unknown words
    assert tokenizer.n_special == 2
    with pytest.raises(InvalidInput, match="index 1 cannot be tokenised: WordLevel error: Missing") as caught:
        tokenizer.encode(["w1", "w9"])
    assert caught.value.param == "input"


def test_no_room_beside_the_special_tokens() -> None:
    with pytest.raises(InvalidInput, match="at least 3") as caught:
        TOKENIZER.encode(["a"], truncate_to=2)
    assert caught.value.param == "truncate_prompt_tokens"
    assert TOKENIZER.encode(["a b"], truncate_to=1, add_special_tokens=False).lengths.tolist() == [1]
    with pytest.raises(InvalidInput, match="at least 1"):
        TOKENIZER.encode(["a"], truncate_to=0, side=LEFT)


def test_lower_case_as_in_sentence_transformers() -> None:
    text = word_level(None)
    ids = json.loads(text)["model"]["vocab"]
    assert rows(TextTokenizer(text, RECIPE).encode(["W1"])) == [[ids["W1"]]]
    lowered = TextTokenizer(finished(text, do_lower_case=True), RECIPE)
    assert rows(lowered.encode(["W1 W2"])) == [[ids["w1"], ids["w2"]]]
    both = TextTokenizer(finished(MINILM, do_lower_case=True), RECIPE)
    assert rows(both.encode(["Hello CAFÉ東京 [SEP]"])) == rows(TOKENIZER.encode(["hello café東京 [SEP]"]))


def test_a_finished_tokenizer_needs_no_further_word() -> None:
    """Whoever follows the wire format uses it as it is: it neither pads nor cuts."""
    plain: Tokenizer = Tokenizer.from_str(finished(MINILM, do_lower_case=False))
    for text in ("short", "word " * 300):
        assert plain.encode(text).ids == rows(TOKENIZER.encode([text]))[0]
    assert finished(finished(MINILM, do_lower_case=False), do_lower_case=False) == finished(MINILM, do_lower_case=False)
    for broken in ("", "[]", "5"):
        with pytest.raises(ModelLoadError, match="no JSON object"):
            finished(broken, do_lower_case=False)


@pytest.mark.parametrize("texts", [["a\ud800b"], ["fine", "a\ud800b"]])
def test_a_lone_surrogate_is_the_callers_error(texts: list[str]) -> None:
    with pytest.raises(InvalidInput, match=rf"index {len(texts) - 1} .* U\+D800 at character 1") as caught:
        TOKENIZER.encode(texts)
    assert caught.value.param == "input"


def test_something_else_than_text_is_the_callers_error() -> None:
    with pytest.raises(InvalidInput, match="index 1 is not a text"):
        TOKENIZER.encode(["a", 3])  # type: ignore[list-item]  # as a careless caller would


def test_limits_of_the_vocabulary() -> None:
    assert TOKENIZER.vocab_size == 30522
    assert TOKENIZER.max_token_chars == len("telecommunications")
    assert TextTokenizer(word_level(None), RECIPE).max_token_chars == len("</s>")


@pytest.mark.parametrize("text", ["", "{}", "not JSON", MINILM[:1000]])
def test_a_damaged_tokenizer(text: str) -> None:
    with pytest.raises(ModelLoadError, match="the tokenizer cannot be read"):
        TextTokenizer(text, RECIPE)


def test_threads_share_one_tokenizer() -> None:
    texts = [f"text {number} " * (number % 7) for number in range(60)]
    sides = [(limit, side) for limit in (None, 3, 5) for side in TruncationSide]

    def work(turn: int) -> list[list[int]]:
        limit, side = sides[turn % len(sides)]
        return rows(TOKENIZER.encode(texts, truncate_to=limit, side=side))

    expected = [work(turn) for turn in range(len(sides))]
    with ThreadPoolExecutor(4) as pool:
        for turn, result in enumerate(pool.map(work, range(3 * len(sides)))):
            assert result == expected[turn % len(sides)]


@given(
    st.lists(st.lists(st.integers(0, 70_000), max_size=6), max_size=6),
    st.integers(1, 7),
    st.sampled_from(TruncationSide),
    st.sampled_from([RIGHT, LEFT]),
    st.sampled_from([np.int64, np.uint32]),
)
def test_cut_is_a_slice_of_each_input(
    inputs: list[list[int]], limit: int, side: TruncationSide, model_side: TruncationSide, kind: type[np.integer]
) -> None:
    ids = np.array([number for each in inputs for number in each], kind)
    lengths = np.array([len(each) for each in inputs], np.uint32)
    tokens = cut(ids, lengths, limit, side, model_side)
    effective = model_side if side is MODEL else side
    assert rows(tokens) == [each[-limit:] if effective is LEFT else each[:limit] for each in inputs]
    assert tokens.truncated == sum(len(each) > limit for each in inputs)
    assert (tokens.ids.dtype.name, tokens.lengths.dtype.name) == ("uint32", "uint32")


def test_inputs_can_be_left_without_tokens() -> None:
    tokens = Tokens(np.arange(6, dtype=np.uint32), np.array([2, 3, 1], np.uint32), np.array([True, True, False]))
    assert tokens.without(()) is tokens
    some = tokens.without({1})
    assert (some.ids.tolist(), some.lengths.tolist(), some.truncated) == ([0, 1, 5], [2, 0, 1], 1)


def test_ids_back_to_text() -> None:
    ids = TOKENIZER.encode(["hello worldliness"]).ids.tolist()
    assert TOKENIZER.decode(ids) == "[CLS] hello worldliness [SEP]"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "hello worldliness"
    assert TOKENIZER.token_strings(ids) == ["[CLS]", "hello", "world", "##liness", "[SEP]"]
    assert (TOKENIZER.decode([]), TOKENIZER.token_strings([])) == ("", [])


@pytest.mark.parametrize("token", [-1, 30522, 2**70])
def test_ids_that_are_no_text(token: int) -> None:
    for read in (TOKENIZER.decode, TOKENIZER.token_strings):
        with pytest.raises(InvalidInput, match=f"Token id {token} is out of vocabulary.* 0 to 30521"):
            read([CLS, token])


def test_a_long_text_alone_leaves_the_interpreter_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(MINILM, RECIPE)
    asked: list[str] = []

    class Watched:
        """The library's tokenizer, whose `encode` holds the interpreter lock while its batches do not."""

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(PLAIN, name)

    monkeypatch.setattr(tokenizer, "_tokenizer", Watched())
    short, long = tokenizer.encode(["queue"]), tokenizer.encode(["queue " * 1000])
    assert asked == ["encode", "encode_batch_fast"]
    assert long.ids[1] == short.ids[1]
    assert [len(short.ids), len(long.ids)] == [len(PLAIN.encode(text).ids) for text in ("queue", "queue " * 1000)]


@pytest.mark.parametrize("truncate_to", [None, 4])
def test_texts_go_through_the_library_in_groups(monkeypatch: pytest.MonkeyPatch, truncate_to: int | None) -> None:
    texts = ["one two three", "", "four", "five six seven eight nine", "ten", "e", "f", "g"]
    whole = TOKENIZER.encode(texts, truncate_to=truncate_to)
    monkeypatch.setattr(tokenization, "GROUP_CHARS", 10)
    grouped = TOKENIZER.encode(texts, truncate_to=truncate_to)
    assert (grouped.ids.tolist(), grouped.lengths.tolist()) == (whole.ids.tolist(), whole.lengths.tolist())
    assert grouped.truncated == whole.truncated == (0 if truncate_to is None else 2)
    if whole.cut is not None and grouped.cut is not None:
        assert grouped.cut.tolist() == whole.cut.tolist()
    with pytest.raises(InvalidInput, match="index 9 is not valid Unicode"):
        TOKENIZER.encode([*texts, "h", "\ud800"])


def test_no_group_is_larger_than_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(MINILM, RECIPE)
    real, sizes = tokenizer._tokenizer, []

    class Library:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Any:
            sizes.append(list(map(len, texts)))
            return real.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "_tokenizer", Library())
    monkeypatch.setattr(tokenization, "GROUP_CHARS", 10)
    monkeypatch.setattr(tokenization, "_LONE_CHARS", 0)
    tokenizer.encode(["a" * size for size in (4, 6, 1, 30, 2, 8, 1)])
    assert sizes == [[4, 6], [1], [30], [2, 8], [1]]


def test_looking_for_unreadable_texts_leaves_the_interpreter_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(MINILM, RECIPE)
    real, tried = tokenizer._tokenizer, []

    class Library:
        """`encode` of the library holds the interpreter lock while its batches do not."""

        def encode_batch_fast(self, texts: list[str]) -> Any:
            tried.extend(texts)
            return real.encode_batch_fast(texts)

    monkeypatch.setattr(tokenizer, "_tokenizer", Library())
    refused = dict(tokenizer.unreadable(["a" * 3000, "\ud800", 3, "b"], 5))  # type: ignore[list-item]
    assert sorted(refused) == [6, 7]
    assert tried == ["a" * 3000, "b"]
