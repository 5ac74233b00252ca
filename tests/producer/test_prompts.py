"""Prompts and adapters on their way to the queue: which one a request gets, and what it changes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedstream.producer import LongInputs, Options
from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import ON_LOOP_CHARS, prepare, prepare_texts
from embedstream.producer.request import Inputs, cut_into_jobs
from embedstream.shared.cards import ChatFormat, ModelCard
from embedstream.shared.errors import InputTooLong, InvalidInput
from embedstream.shared.jobs import Job, TruncationSide
from embedstream.shared.keys import Keys
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import NO_PROMPT, ROLE, Pooling, Recipe
from embedstream.shared.tokenization import TextTokenizer

LIMIT = 16
RECIPE = Recipe(
    LIMIT,
    (Pooling.MEAN,),
    normalize=False,
    dimension=4,
    vocab_size=1000,
    prompts={"query": "the queue: ", "document": "the ", "plain": ""},
    default_prompt="document",
    adapters=("retrieval.query", "sts"),
    default_adapter="sts",
)
LEFT_OUT = replace(RECIPE, include_prompt=False)
CHUNKED, CUT = Options(long_inputs=LongInputs.CHUNK), Options(long_inputs=LongInputs.TRUNCATE)

Serve = Callable[[Recipe], ServedModel]


@pytest.fixture
def serve(wordpiece_json: str) -> Serve:
    def of(recipe: Recipe) -> ServedModel:
        card = ModelCard("m", recipe, wordpiece_json, "r")
        return ServedModel(Keys("t", "m"), ("m",), card, TextTokenizer(wordpiece_json, recipe))

    return of


async def job_of(inputs: Inputs, options: Options, served: ServedModel) -> Job:
    (job,) = cut_into_jobs(await prepare(inputs, options, served), bytes(16), 1000)
    return job


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("", "document"),
        (NO_PROMPT, ""),
        ("query", "query"),
        ("plain", "plain"),
        (f"{ROLE}query", "query"),
        (f"{ROLE}passage", "document"),
    ],
)
async def test_the_prompt_is_a_part_of_each_text(serve: Serve, asked: str, name: str) -> None:
    served, texts = serve(RECIPE), ["abc", "", "a"]
    prepared = await prepare(texts, Options(prompt=asked), served)
    whole = served.tokenizer.encode([RECIPE.prompt_text(name) + text for text in texts])
    assert prepared.tokens.ids.tolist() == whole.ids.tolist()
    assert prepared.tokens.lengths.tolist() == whole.lengths.tolist()  # what usage counts
    assert prepared.inputs is texts
    (job,) = cut_into_jobs(prepared, bytes(16), 1000)
    assert (job.prompt_name, job.n_tokens) == (name, len(whole.ids))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(), "sts"),
        (Options(adapter="retrieval.query"), "retrieval.query"),
        (Options(prompt=f"{ROLE}search_query"), "retrieval.query"),
        (Options(prompt=f"{ROLE}search_query", adapter="sts"), "sts"),
    ],
)
@pytest.mark.parametrize("inputs", [["a"], [[5, 6]]])
async def test_jobs_name_the_adapter(serve: Serve, inputs: Inputs, options: Options, name: str) -> None:
    served = serve(replace(RECIPE, prompts={}, default_prompt=""))  # then ids may have a role too
    assert (await job_of(inputs, options, served)).adapter == name


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (Options(prompt="nope"), "prompt_name"),
        (Options(prompt=f"{ROLE}nope"), "input_type"),
        (Options(adapter="nope"), "task"),
    ],
)
@pytest.mark.parametrize("inputs", [["a"], [[5, 6]]])
async def test_what_the_model_lacks_is_refused(serve: Serve, inputs: Inputs, options: Options, param: str) -> None:
    with pytest.raises(InvalidInput, match=r"The model has no .*; it has") as refusal:
        await prepare(inputs, options, serve(RECIPE))
    assert refusal.value.param == param


CHAT = ChatFormat({"default": "{{ messages }}"}, {})


@pytest.mark.parametrize(
    ("inputs", "options", "what"),
    [([[2, 5, 3]], Options(), "token ids"), (["the queue"], Options(chat=CHAT), "chat messages")],
)
async def test_neither_ids_nor_chat_messages_get_a_prompt(
    serve: Serve, inputs: Inputs, options: Options, what: str
) -> None:
    served = serve(RECIPE)
    plain = await job_of(inputs, options, served)
    assert plain.prompt_name == ""
    assert plain.n_tokens == (3 if isinstance(inputs[0], list) else 4)
    for harmless in (NO_PROMPT, "plain", f"{ROLE}plain"):  # nothing would have been put before them
        assert (await job_of(inputs, replace(options, prompt=harmless), served)).ids is not None
    for asked, param in (("document", "prompt_name"), (f"{ROLE}query", "input_type")):
        with pytest.raises(InvalidInput, match=f"cannot be put before {what}") as refusal:
            await prepare(inputs, replace(options, prompt=asked), served)
        assert refusal.value.param == param


async def test_limits_count_the_prompt(serve: Serve) -> None:
    served, fits = serve(RECIPE), "abcdefghijklm"  # 13 letters, "the" and two special tokens
    assert (await prepare([fits], Options(), served)).n_tokens == LIMIT
    with pytest.raises(InputTooLong, match="has 17 tokens"):
        await prepare([fits + "n"], Options(), served)
    with pytest.raises(InputTooLong, match=r"contains 100 characters.*value=100\)"):
        await prepare(["a" * 96], Options(), serve(replace(RECIPE, max_length=14)))
    cut = await prepare([fits + "nop"], CUT, served)
    assert cut.tokens.ids.tolist() == served.tokenizer.encode(["the " + fits]).ids.tolist()
    assert cut.tokens.truncated == 1
    pieces = await prepare([fits + "no", "a"], CHUNKED, served)
    assert (pieces.n_tokens, pieces.plan.counts.tolist()) == (LIMIT + 2 + 4, [2, 1])


async def test_large_prompts_are_not_tokenised_on_the_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, max_length=10**6, prompts={"document": "a" * ON_LOOP_CHARS})
    threads: list[object] = []
    in_thread = asyncio.to_thread

    async def noted(work: Callable[..., Any], *args: Any) -> Any:
        threads.append(work)
        return await in_thread(work, *args)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    served = serve(recipe)
    await prepare(["a"], Options(prompt=NO_PROMPT), served)
    assert not threads
    await prepare(["a"], Options(), served)
    assert threads


@pytest.mark.parametrize("partial", [False, True])
async def test_a_bad_text_is_told_in_the_callers_places(serve: Serve, partial: bool) -> None:
    texts, options = ["a", "b\ud800"], Options(prompt="query", partial=partial)
    if partial:
        prepared = await prepare(texts, options, serve(RECIPE))
        assert prepared.tokens.lengths.tolist() == [6, 0]
        message = prepared.failures[1].message
    else:
        with pytest.raises(InvalidInput) as refusal:
            await prepare(texts, options, serve(RECIPE))
        message = str(refusal.value)
    assert message == "The input at index 1 is not valid Unicode: a lone surrogate U+D800 at character 1."


@pytest.mark.parametrize("partial", [False, True])
async def test_a_prompt_that_is_left_out_does_not_go_with_pieces(serve: Serve, partial: bool) -> None:
    served, texts = serve(LEFT_OUT), ["abc", "abcdefghijklmnop"]
    options = replace(CHUNKED, partial=partial)
    if partial:
        prepared = await prepare(texts, options, served)
        assert prepared.plan.counts.tolist() == [1, 0]
        assert "cannot be embedded in pieces" in prepared.failures[1].message
    else:
        with pytest.raises(InputTooLong, match="index 1 has 19 tokens, more than the model's 16, and cannot be emb"):
            await prepare(texts, options, served)
    for other in (replace(options, prompt=NO_PROMPT), replace(options, vectors=VectorOptions(per_token=True))):
        assert (await prepare(texts, other, served)).plan.counts.tolist() == [1, 2]


async def test_a_prompt_that_is_left_out_is_not_cut_off(serve: Serve) -> None:
    served, options = serve(LEFT_OUT), replace(CUT, truncation_side=TruncationSide.LEFT)
    with pytest.raises(InvalidInput, match="cannot be cut on the left") as refusal:
        await prepare(["abc"], options, served)
    assert refusal.value.param == "truncation_side"
    assert (await prepare(["abc"], replace(options, prompt=NO_PROMPT), served)).n_tokens == 5
    assert (await prepare(["abc"], replace(options, long_inputs=LongInputs.ERROR), served)).n_tokens == 6


async def test_jobs_of_ids_tell_whether_their_texts_had_special_tokens(serve: Serve) -> None:
    for special in (False, True):  # a consumer counts the prompt's tokens by it
        job = await job_of(["abc"], Options(add_special_tokens=special), serve(LEFT_OUT))
        assert (job.add_special_tokens, job.prompt_name) == (special, "document")


async def test_a_text_job_carries_what_was_asked_for() -> None:
    prepared = await prepare_texts(["a"], Options(prompt=f"{ROLE}query", adapter="sts"), "m")
    (job,) = cut_into_jobs(prepared, bytes(16), 1000)
    assert (job.texts, job.prompt_name, job.adapter) == (("a",), f"{ROLE}query", "sts")


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        (Options(prompt="x" * 256), "prompt_name has 256 bytes; a name has at most 255", "prompt_name"),
        (Options(prompt=ROLE + "x" * 251), "input_type has 256 bytes", "input_type"),
        (Options(adapter="é" * 128), "task has 256 bytes", "task"),
        (Options(adapter="\ud800"), "task is not valid Unicode", "task"),
    ],
)
async def test_names_no_job_has_room_for_are_refused(options: Options, message: str, param: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refusal:
        await prepare_texts(["a"], options, "m")
    assert refusal.value.param == param


async def test_token_vectors_have_the_size_of_hidden_states(serve: Serve) -> None:
    served = serve(replace(RECIPE, token_dimension=8, matryoshka_dims=None))
    for per_token, size in ((False, 4), (True, 8)):
        options = Options(VectorOptions(per_token=per_token))
        assert (await prepare([[5]], options, served)).dimension == size
        asked = Options(VectorOptions(size, per_token=per_token))
        assert (await prepare(["a"], asked, served)).dimension == size
    for inputs in ([np.array([5])], ["a"]):
        with pytest.raises(InvalidInput, match=r"full size only; dimensions must be unset or 8 \(received dim") as bad:
            await prepare(inputs, Options(VectorOptions(4, per_token=True)), served)
        assert bad.value.param == "dimensions"
