"""Prompts and adapters of jobs: which of the model's they mean, and how many tokens are left out for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.intake import Intake, Refused
from embedstream.shared.cards import ModelCard
from embedstream.shared.jobs import Job, LongInputs, TruncationSide, text_lengths
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import NO_PROMPT, ROLE, Pooling, Recipe
from embedstream.shared.results import Status
from embedstream.shared.tokenization import TextTokenizer

RECIPE = Recipe(
    8,
    (Pooling.MEAN,),
    normalize=True,
    dimension=4,
    vocab_size=100,
    prompts={"query": "the queue: ", "document": "the ", "plain": ""},
    default_prompt="document",
    adapters=("retrieval.query", "sts"),
    default_adapter="sts",
)
LEFT_OUT = replace(RECIPE, include_prompt=False)
TEXTS = ("a", "b c")


class Taker:
    """An intake, and what it makes of jobs."""

    def __init__(self, tokenizer_json: str, recipe: Recipe) -> None:
        self.recipe = recipe
        self.card = ModelCard("m", recipe, tokenizer_json, "r")
        self.tokenizer = TextTokenizer(tokenizer_json, recipe)
        self._intake = Intake(self.card, self.tokenizer, "t:{m}:r:")

    def of_texts(self, texts: tuple[str, ...] = TEXTS, **fields: Any) -> Job:
        return Job(b"r" * 16, 0, 1, 0, 1000, text_lengths(texts), texts=texts, **fields)

    def of_ids(self, texts: tuple[str, ...] = TEXTS, prompt: str = "", **fields: Any) -> Job:
        special = fields.get("add_special_tokens", True)
        tokens = self.tokenizer.encode(texts, prompt=prompt, add_special_tokens=special)
        ids, fingerprint = tokens.ids.astype(np.uint16), self.card.fingerprint
        return Job(b"r" * 16, 0, 1, 0, 1000, tokens.lengths, ids=ids, fingerprint=fingerprint, **fields)

    async def take(self, job: Job) -> Entry | Refused:
        header, body = job.encode()
        raw = RawEntry(Lane.INTERACTIVE, b"5000-0", {b"h": header, b"b": body, b"rt": b"t:{m}:r:me"})
        return await self._intake.accept(raw, 5000)

    async def entry(self, job: Job) -> Entry:
        entry = await self.take(job)
        assert isinstance(entry, Entry)
        return entry


@pytest.fixture
def taker(wordpiece_json: str) -> Taker:
    return Taker(wordpiece_json, RECIPE)


@pytest.fixture
def leaving_out(wordpiece_json: str) -> Taker:
    return Taker(wordpiece_json, LEFT_OUT)


@pytest.mark.parametrize(
    ("asked", "prompt", "adapter"),
    [
        ("", "the ", "sts"),
        (NO_PROMPT, "", "sts"),
        ("query", "the queue: ", "sts"),
        ("plain", "", "sts"),
        (f"{ROLE}query", "the queue: ", "retrieval.query"),
        (f"{ROLE}document", "the ", "sts"),
    ],
)
async def test_texts_get_the_prompt_they_ask_for(taker: Taker, asked: str, prompt: str, adapter: str) -> None:
    entry = await taker.entry(taker.of_texts(prompt_name=asked))
    whole = taker.tokenizer.encode([prompt + text for text in TEXTS])
    assert entry.tokens.ids.tolist() == whole.ids.tolist()
    assert entry.rows["tokens"].tolist() == whole.lengths.tolist()
    assert (entry.adapter, entry.skip) == (adapter, 0)


async def test_ids_stay_as_they_are(taker: Taker) -> None:
    for name in ("", "query"):
        job = taker.of_ids(prompt_name=name)
        entry = await taker.entry(job)
        assert job.ids is not None
        assert entry.tokens.ids.tolist() == job.ids.tolist()
        assert (entry.adapter, entry.skip) == ("sts", 0)


@pytest.mark.parametrize("of", [Taker.of_texts, Taker.of_ids])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": "nope"}, "no adapter `nope`; it has `retrieval.query`, `sts`."),
        ({"prompt_name": "nope"}, "no prompt `nope`; it has `query`, `document`, `plain`."),
    ],
)
async def test_unknown_names_are_refused(taker: Taker, of: Any, fields: dict[str, str], message: str) -> None:
    refused = await taker.take(of(taker, **fields))
    assert isinstance(refused, Refused)
    assert message in refused.reason
    assert refused.answer is not None
    assert refused.answer.rows["status"].tolist() == [Status.INVALID_INPUT] * 2
    assert not refused.dead_letter
    assert (await taker.entry(of(taker, adapter="retrieval.query"))).adapter == "retrieval.query"


@pytest.mark.parametrize("name", [NO_PROMPT, f"{ROLE}query"])
async def test_ids_begin_with_a_prompt_by_its_name_alone(taker: Taker, name: str) -> None:
    refused = await taker.take(taker.of_ids(prompt_name=name))
    assert isinstance(refused, Refused)
    assert f"no prompt `{name}`" in refused.reason


@pytest.mark.parametrize(
    ("name", "special", "skip"),
    [
        ("query", True, 4),  # [CLS], two words and a colon
        ("document", True, 2),
        ("document", False, 1),
        ("plain", True, 0),
        ("", True, 0),
    ],
)
async def test_how_many_tokens_are_left_out(leaving_out: Taker, name: str, special: bool, skip: int) -> None:
    by_ids = leaving_out.of_ids(prompt=LEFT_OUT.prompt_text(name), prompt_name=name, add_special_tokens=special)
    by_text = leaving_out.of_texts(prompt_name=name or NO_PROMPT, add_special_tokens=special)
    for job in (by_ids, by_text):
        entry = await leaving_out.entry(job)
        assert entry.skip == skip
        tokens = replace(job, options=VectorOptions(per_token=True))
        assert (await leaving_out.entry(tokens)).skip == 0  # each token has its vector


async def test_the_default_prompt_is_left_out_of_texts(leaving_out: Taker) -> None:
    assert (await leaving_out.entry(leaving_out.of_texts())).skip == 2


async def test_a_prompt_is_counted_once(leaving_out: Taker, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, count = [], leaving_out.tokenizer.prompt_length

    def noted(prompt: str, **how: Any) -> int:
        counted.append(prompt)
        return count(prompt, **how)

    monkeypatch.setattr(leaving_out.tokenizer, "prompt_length", noted)
    for _ in range(3):
        for name in ("query", "document"):
            await leaving_out.entry(leaving_out.of_texts(("a",), prompt_name=name))
    assert counted == ["the queue: ", "the "]


async def test_long_inputs_do_not_go_in_pieces_without_their_prompt(leaving_out: Taker) -> None:
    texts = ("a b c d e f g", "a")
    for job in (
        leaving_out.of_texts(texts, long_inputs=LongInputs.CHUNK),
        leaving_out.of_ids(texts, "the ", prompt_name="document", long_inputs=LongInputs.CHUNK),
    ):
        entry = await leaving_out.entry(job)
        assert entry.pieces is None
        assert entry.rows["status"].tolist() == [Status.INPUT_TOO_LONG, Status.OK]
        entry.store(entry.waiting_rows(), np.ones((1, 4), np.float32))
        assert "cannot be embedded in pieces" in entry.result(b"f" * 16).message(0)
    whole = await leaving_out.entry(leaving_out.of_texts(texts, prompt_name=NO_PROMPT, long_inputs=LongInputs.CHUNK))
    assert whole.pieces is not None


async def test_an_input_that_is_all_prompt_is_refused(leaving_out: Taker) -> None:
    job = leaving_out.of_texts(prompt_name="query", long_inputs=LongInputs.TRUNCATE, truncate_to=4)
    entry = await leaving_out.entry(job)
    assert entry.rows["status"].tolist() == [Status.INVALID_INPUT] * 2
    assert "Nothing is left of the input beside the 4 tokens" in entry.result(b"f" * 16).message(0)


async def test_no_prompt_that_is_left_out_is_cut_off(leaving_out: Taker, wordpiece_json: str) -> None:
    cut: Any = {"long_inputs": LongInputs.TRUNCATE, "truncation_side": TruncationSide.LEFT}
    left_sided = Taker(wordpiece_json, replace(LEFT_OUT, truncation_side=TruncationSide.LEFT))
    for taker, job in (
        (leaving_out, leaving_out.of_texts(**cut)),
        (leaving_out, leaving_out.of_ids(prompt_name="document", **cut)),
        (left_sided, left_sided.of_ids(prompt_name="document", long_inputs=LongInputs.TRUNCATE)),
    ):
        refused = await taker.take(job)
        assert isinstance(refused, Refused)
        assert "cannot be cut on the left" in refused.reason
    assert (await left_sided.entry(left_sided.of_texts(long_inputs=LongInputs.TRUNCATE))).skip == 2
    assert (await leaving_out.entry(leaving_out.of_ids(**cut))).skip == 0


async def test_pieces_keep_the_adapter(taker: Taker) -> None:
    texts = ("a b c d e f g h i j", "a")
    entry = await taker.entry(taker.of_texts(texts, prompt_name=f"{ROLE}query", long_inputs=LongInputs.CHUNK))
    assert entry.pieces is not None
    assert entry.adapter == "retrieval.query"


async def test_sizes_of_token_vectors(wordpiece_json: str) -> None:
    taker = Taker(wordpiece_json, replace(RECIPE, token_dimension=8, matryoshka_dims=None))
    assert await taker.entry(taker.of_ids(options=VectorOptions(8, per_token=True)))
    refused = await taker.take(taker.of_ids(options=VectorOptions(4, per_token=True)))
    assert isinstance(refused, Refused)
    assert "full size only" in refused.reason
