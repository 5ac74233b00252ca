from __future__ import annotations

import re

import numpy as np
import pytest

from embedstream.shared.errors import InvalidInput
from embedstream.shared.input_checks import long_texts, resolve_truncation, too_long, unknown_ids, without_tokens
from embedstream.shared.recipe import Pooling, Recipe

RECIPE = Recipe(max_length=256, pooling=(Pooling.MEAN,), normalize=True, dimension=384, vocab_size=30522)


def test_too_long_in_the_words_of_vllm() -> None:
    assert list(too_long(np.array([256, 1], np.uint32), 256)) == []
    (index, error), (other, _) = too_long(np.array([256, 300, 400], np.uint32), 256)
    assert (index, other) == (1, 2)
    assert str(error).startswith(
        "This model's maximum context length is 256 tokens. However, your prompt contains at least 257 input tokens, "
        "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
        "(parameter=input_tokens, value=257)"
    )
    assert "index 1 has 300 tokens" in str(error)
    assert '"truncate_prompt_tokens": -1' in str(error)
    assert error.param == "input_tokens"


def test_texts_too_long_to_be_tokenised() -> None:
    assert list(long_texts(["x" * 180, ""], 10, 18)) == []
    ((index, error),) = long_texts(["", "x" * 181], 10, 18)
    assert index == 1
    assert str(error).startswith("This model's maximum context length is 10 tokens.")
    assert "181 characters (more than 180" in str(error)
    assert "index 1" in str(error)
    assert error.param == "input_text"


def test_texts_too_long_with_their_prompt() -> None:
    assert [index for index, _ in long_texts(["a" * 5, "a" * 6], 2, 5, 5)] == [1]
    assert not list(long_texts(["a" * 5, "a" * 6], 2, 5))


@pytest.mark.parametrize(
    ("asked", "n_special", "expected"), [(None, 2, None), (-1, 2, 256), (256, 2, 256), (3, 2, 3), (1, 0, 1)]
)
def test_legal_truncations(asked: int | None, n_special: int, expected: int | None) -> None:
    assert resolve_truncation(asked, RECIPE, n_special) == expected


@pytest.mark.parametrize(
    ("asked", "n_special", "message"),
    [
        (257, 2, "truncate_prompt_tokens value is greater than max_model_len.*at most 256, got 257"),
        (2**80, 0, "greater than max_model_len"),
        (2, 2, "at least 3"),
        (0, 2, "at least 3"),
        (0, 0, "at least 1"),
        (-2, 0, "must be -1 or at least 1"),
        (-(2**80), 2, "must be -1 or at least 3"),
    ],
)
def test_illegal_truncations(asked: int, n_special: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        resolve_truncation(asked, RECIPE, n_special)
    assert caught.value.param == "truncate_prompt_tokens"


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.uint32])
def test_ids_within_the_vocabulary(kind: type[np.integer]) -> None:
    assert list(unknown_ids(np.array([0, 99, 5], kind), np.array([2, 1], kind), 100)) == []
    assert list(unknown_ids(np.array([], kind), np.array([], kind), 100)) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 99, 100], r"Token id 100 is out of vocabulary.* 0 to 99 \(input at index 1\)"),
        ([0, -1, 500], r"Token id -1 is out of vocabulary.*\(input at index 0\)"),
        ([2**40, 0, 0], r"Token id 1099511627776 is out of vocabulary"),
    ],
)
def test_ids_out_of_the_vocabulary(ids: list[int], message: str) -> None:
    _, error = next(unknown_ids(np.array(ids), np.array([2, 1]), 100))
    assert re.search(message, str(error))
    assert error.param == "input"


def test_every_input_with_an_unknown_id_is_named_once() -> None:
    found = unknown_ids(np.array([100, 101, 5, 102]), np.array([2, 0, 1, 0, 1]), 100)
    assert [(index, str(error).split()[2]) for index, error in found] == [(0, "100"), (4, "102")]


def test_inputs_without_tokens() -> None:
    found = dict(without_tokens(np.array([2, 0, 1, 0])))
    assert list(found) == [1, 3]
    for index, error in found.items():
        assert str(error).startswith(f"The decoder prompt cannot be empty: the input at index {index} ")
