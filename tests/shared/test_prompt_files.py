from __future__ import annotations

from typing import Any

import pytest

from embedstream.shared.errors import ModelLoadError

from .made_files import BERT, WHOLE, Make, recipe_of

PROMPTS = {"query": "query: ", "passage": "passage: "}


def test_prompts(make: Make) -> None:
    whole = {"prompts": {**PROMPTS, "none": None}, "default_prompt_name": "passage", "similarity_fn_name": "dot"}
    recipe = recipe_of(make(others={WHOLE: whole}))
    assert recipe.prompts == {**PROMPTS, "none": ""}
    assert (recipe.default_prompt, recipe.similarity) == ("passage", "dot")


def test_a_model_without_prompts(make: Make) -> None:
    whole = {"prompts": None, "default_prompt_name": None, "similarity_fn_name": None, "truncate_dim": None}
    for others in ({}, {WHOLE: {"model_type": "SentenceTransformer"}}, {WHOLE: whole}):
        recipe = recipe_of(make(others=others))
        assert (recipe.prompts, recipe.default_prompt, recipe.similarity) == ({}, "", "cosine")


def test_the_operator_chooses_the_default(make: Make) -> None:
    files = make(others={WHOLE: {"prompts": PROMPTS, "default_prompt_name": "query"}})
    assert recipe_of(files, default_prompt_name="passage").default_prompt == "passage"
    assert recipe_of(files, default_prompt_name="").default_prompt == ""
    with pytest.raises(ModelLoadError, match=r"--default-prompt-name is 'document', .* it has 'query', 'passage'"):
        recipe_of(files, default_prompt_name="document")


def test_a_default_that_every_model_has(make: Make) -> None:
    """Without a text: sentence-transformers has a query and a document prompt for each model."""
    recipe = recipe_of(make(others={WHOLE: {"default_prompt_name": "query"}}))
    assert (recipe.default_prompt, recipe.prompts) == ("", {})


def test_instructions_of_jina(make: Make) -> None:
    config = {**BERT, "task_instructions": {"retrieval.query": "Represent: "}}
    assert recipe_of(make(config=config)).prompts == {"retrieval.query": "Represent: "}
    assert recipe_of(make(config=config, others={WHOLE: {"prompts": PROMPTS}})).prompts == PROMPTS


def test_without_modules_the_file_counts_as_little_as_for_sentence_transformers(make: Make) -> None:
    files = make(modules=None, others={WHOLE: {"prompts": PROMPTS, "default_prompt_name": "query", "truncate_dim": 4}})
    recipe = recipe_of(files)
    assert (recipe.prompts, recipe.default_prompt, recipe.dimension) == ({}, "", 32)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ({"prompts": ["query: "]}, "prompts is .*, not a table of texts"),
        ({"prompts": {"query": 3}}, "the prompt 'query' is 3, not a text"),
        ({"prompts": {"query": "\ud800"}}, "no Unicode text"),
        ({"prompts": {"\ud800": "query"}}, "no Unicode text"),
        ({"prompts": {"-": "x"}}, "no prompt may have the name '-'"),
        ({"prompts": {"": "x"}}, "no prompt may have the name ''"),
        ({"prompts": {"role:query": "x"}}, "no prompt may have the name 'role:query'"),
        ({"prompts": {"é" * 128: "x"}}, "the name of a prompt has more than 255 bytes"),  # a job has no room for it
        ({"default_prompt_name": "passage"}, "default_prompt_name is 'passage', but .* it has none"),
        ({"default_prompt_name": ["query"]}, "default_prompt_name is \\['query'\\]"),
        ({"similarity_fn_name": "maxsim"}, "'maxsim', which is none of cosine"),
        ({"truncate_dim": 0}, "truncate_dim is 0, not a size"),
        ({"truncate_dim": "16"}, "truncate_dim is '16', not a number"),
        ({"model_type": "CrossEncoder"}, "TEI's /rerank"),
        ({"model_type": "SparseEncoder"}, "SparseEncoder, or TEI's /embed_sparse"),
        ({"model_type": "MultiVectorEncoder"}, "PyLate"),
        ({"model_type": "ColBERT"}, "PyLate"),
        ({"model_type": ["x"]}, "not known here"),
    ],
)
def test_what_is_not_understood(make: Make, whole: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"{WHOLE}: .*{message}") as caught:
        recipe_of(make(others={WHOLE: whole}))
    assert "\n" not in str(caught.value)


def test_a_reranker_without_modules(make: Make) -> None:
    with pytest.raises(ModelLoadError, match="TEI's /rerank"):
        recipe_of(make(modules=None, others={WHOLE: {"model_type": "CrossEncoder"}}))
