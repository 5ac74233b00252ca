from __future__ import annotations

from dataclasses import replace

import pytest

from embedstream.shared.errors import InvalidInput
from embedstream.shared.recipe import NO_PROMPT, ROLE, Pooling, Recipe

PLAIN = Recipe(16, (Pooling.MEAN,), normalize=True, dimension=4, vocab_size=100)
WITH_PROMPTS = replace(PLAIN, prompts={"query": "q: ", "passage": "p: ", "sts": "s: "}, default_prompt="sts")
WITH_ADAPTERS = replace(PLAIN, adapters=("retrieval.query", "retrieval.passage", "sts"), default_adapter="sts")


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("", "sts"),
        (NO_PROMPT, ""),
        ("query", "query"),
        (f"{ROLE}query", "query"),
        (f"{ROLE}search_query", "query"),
        (f"{ROLE}document", "passage"),
        (f"{ROLE}passage", "passage"),
        (f"{ROLE}sts", "sts"),
    ],
)
def test_which_prompt_is_put_before_texts(asked: str, name: str) -> None:
    assert WITH_PROMPTS.prompt_of(asked) == name


def test_a_query_without_a_prompt_of_its_own_gets_none_as_in_sentence_transformers() -> None:
    recipe = replace(PLAIN, prompts={"sts": "s: "}, default_prompt="sts")
    assert recipe.prompt_of(f"{ROLE}query") == ""


def test_the_name_of_an_adapter_asks_for_no_prompt() -> None:
    recipe = replace(WITH_PROMPTS, adapters=("separation",))
    assert recipe.prompt_of(f"{ROLE}separation") == ""
    assert recipe.adapter_of("", f"{ROLE}separation") == "separation"


@pytest.mark.parametrize("asked", ["", NO_PROMPT, f"{ROLE}query", f"{ROLE}document", f"{ROLE}anything"])
def test_a_model_without_prompts_knows_all_roles(asked: str) -> None:
    assert PLAIN.prompt_of(asked) == ""


@pytest.mark.parametrize(("asked", "param"), [("nope", "prompt_name"), (f"{ROLE}nope", "input_type")])
def test_an_unknown_prompt_is_refused_with_those_there_are(asked: str, param: str) -> None:
    with pytest.raises(InvalidInput, match=r"no prompt `nope`; it has `query`, `passage`, `sts`\.") as refusal:
        WITH_PROMPTS.prompt_of(asked)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("asked", "prompt", "name"),
    [
        ("", "", "sts"),
        ("retrieval.query", "", "retrieval.query"),
        ("", f"{ROLE}query", "retrieval.query"),
        ("", f"{ROLE}passage", "retrieval.passage"),
        ("sts", f"{ROLE}query", "sts"),
        ("", "query", "sts"),
    ],
)
def test_which_adapter_computes(asked: str, prompt: str, name: str) -> None:
    assert WITH_ADAPTERS.adapter_of(asked, prompt) == name


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(InvalidInput, match="has no adapter `x`; it has none") as refusal:
        PLAIN.adapter_of("x")
    assert refusal.value.param == "task"
    with pytest.raises(InvalidInput, match=r"it has `retrieval\.query`, `retrieval\.passage`, `sts`\."):
        WITH_ADAPTERS.adapter_of("x")


def test_sizes_of_whole_vectors_and_of_token_vectors() -> None:
    assert (PLAIN.size(per_token=False), PLAIN.size(per_token=True)) == (4, 4)
    projected = replace(PLAIN, token_dimension=8)
    assert (projected.size(per_token=False), projected.size(per_token=True)) == (4, 8)
    assert replace(PLAIN, pooling=(Pooling.CLS, Pooling.MEAN)).pooling_name == "cls+mean"
    projected.check_dimensions(4, "m")
    projected.check_dimensions(8, "m", per_token=True)
    with pytest.raises(InvalidInput, match="vectors of tokens in full size only; dimensions must be unset or 8"):
        replace(projected, matryoshka_dims=None).check_dimensions(4, "m", per_token=True)


def test_the_text_of_a_prompt() -> None:
    assert [WITH_PROMPTS.prompt_text(name) for name in ("", "query")] == ["", "q: "]
    with pytest.raises(InvalidInput, match=r"no prompt `-`; it has `query`, `passage`, `sts`\."):
        WITH_PROMPTS.prompt_text(NO_PROMPT)
