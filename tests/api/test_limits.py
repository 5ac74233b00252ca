from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.api.conftest import RECIPE, served_model

from embedstream.api.limits import refuse_absurd
from embedstream.producer import LongInputs, Options
from embedstream.shared.errors import InvalidInput
from embedstream.shared.recipe import NO_PROMPT

PLAIN = Options()


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ([[1] * 6, [1] * 6], PLAIN),
        ([[1] * 20], PLAIN),
        ([[1] * 6, [1] * 20], replace(PLAIN, truncate_prompt_tokens=-1)),  # 6 and 10
        ([[1] * 20, [1] * 20], replace(PLAIN, long_inputs=LongInputs.TRUNCATE)),
        ([[1] * 20, [1] * 2], replace(PLAIN, long_inputs=LongInputs.CHUNK)),
        (["x" * 100, "x"], PLAIN),  # the longest entry of the vocabulary has five characters
        (["x" * 101], replace(PLAIN, long_inputs=LongInputs.CHUNK)),
        (["x" * 101], replace(PLAIN, truncate_prompt_tokens=-1)),  # it would be tokenised whole
    ],
)
def test_what_must_have_too_many_tokens_is_refused_untouched(inputs: Any, options: Options) -> None:
    limit = 20 if isinstance(inputs[0], str) else 11
    with pytest.raises(InvalidInput, match=f"at most {limit} tokens") as caught:
        refuse_absurd(inputs, options, served_model(RECIPE), limit)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ([[1] * 5, [1] * 6], PLAIN),
        ([[1] * 2000, [1] * 20], replace(PLAIN, truncate_prompt_tokens=5)),
        ([[1] * 20], replace(PLAIN, long_inputs=LongInputs.TRUNCATE)),
        (["x" * 55], PLAIN),
        (["x" * 55], replace(PLAIN, truncate_prompt_tokens=-1)),  # cut to ten tokens
        ([], PLAIN),
    ],
)
def test_what_may_be_within_the_limit_is_left_to_the_tokenizer(inputs: Any, options: Options) -> None:
    refuse_absurd(inputs, options, served_model(RECIPE), 11)


def test_the_prompt_counts_for_each_text() -> None:
    served = served_model(replace(RECIPE, prompts={"long": "p" * 50}, default_prompt="long"))
    texts = ["x" * 5] * 2
    refuse_absurd(texts, PLAIN, served, 22)
    with pytest.raises(InvalidInput, match="have 110"):
        refuse_absurd(texts, PLAIN, served, 21)
    refuse_absurd(texts, replace(PLAIN, prompt=NO_PROMPT), served, 2)
    refuse_absurd([[1]] * 2, PLAIN, served, 2)


def test_of_an_unknown_model_nothing_is_known() -> None:
    refuse_absurd(["x" * 10_000], PLAIN, None, 11)
