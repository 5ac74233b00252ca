from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.intake import Intake, Refused
from embedstream.shared.cards import ModelCard
from embedstream.shared.jobs import Job, LongInputs, TruncationSide, text_lengths
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import Status
from embedstream.shared.tokenization import TextTokenizer

RECIPE = Recipe(8, (Pooling.MEAN,), normalize=True, dimension=4, vocab_size=100)
REPLY = "t:{m}:r:me"


@pytest.fixture(scope="module")
def intake(wordpiece_json: str) -> Intake:
    return make(wordpiece_json, RECIPE)


def make(tokenizer: str, recipe: Recipe) -> Intake:
    return Intake(ModelCard("m", recipe, tokenizer, "r"), TextTokenizer(tokenizer, recipe), "t:{m}:r:")


@pytest.fixture
def job(wordpiece_json: str) -> Job:
    fingerprint = ModelCard("m", RECIPE, wordpiece_json, "r").fingerprint
    ids = np.array([2, 7, 3, 2, 8, 9, 3], np.uint16)
    return Job(b"r" * 16, 0, 1, 0, 1000, np.array([3, 4], np.uint32), ids=ids, fingerprint=fingerprint)


def raw(job: Job, reply_to: str = REPLY) -> RawEntry:
    header, body = job.encode()
    return RawEntry(Lane.INTERACTIVE, b"5000-0", {b"h": header, b"b": body, b"rt": reply_to.encode()})


def statuses(entry: Entry | Refused) -> list[Status]:
    if isinstance(entry, Refused):
        assert entry.answer is not None
    rows = entry.rows if isinstance(entry, Entry) else entry.answer.rows  # type: ignore[union-attr] # checked above
    return [Status(int(code)) for code in rows["status"]]


async def test_a_good_job_becomes_rows(intake: Intake, job: Job) -> None:
    entry = await intake.accept(raw(job), 5000)
    assert isinstance(entry, Entry)
    assert entry.tokens.ids.tolist() == [2, 7, 3, 2, 8, 9, 3]
    assert entry.waiting_rows().tolist() == [0, 1]
    assert entry.reply_to == REPLY


async def test_text_is_tokenised_here(intake: Intake, job: Job) -> None:
    texts = ("the queue", "the")
    entry = await intake.accept(raw(replace(job, ids=None, texts=texts, lengths=text_lengths(texts))), 5000)
    assert isinstance(entry, Entry)
    assert entry.tokens.lengths.tolist() == [4, 3]
    assert entry.rows["tokens"].tolist() == [4, 3]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"fingerprint": b"x" * 16}, Status.STALE_CARD, "78" * 16),
        ({"adapter": "a"}, Status.INVALID_INPUT, "no adapter `a`; it has none"),
        ({"prompt_name": "query"}, Status.INVALID_INPUT, "no prompt `query`; it has none"),
        ({"options": VectorOptions(dimensions=3)}, Status.INVALID_INPUT, "Matryoshka"),
        ({"long_inputs": LongInputs.TRUNCATE, "truncate_to": 9}, Status.INVALID_INPUT, "truncate_prompt_tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_a_reason(
    intake: Intake, job: Job, changes: dict[str, Any], status: Status, message: str
) -> None:
    refused = await intake.accept(raw(replace(job, **changes)), 5000)
    assert isinstance(refused, Refused)
    assert statuses(refused) == [status, status]
    assert message in refused.reason
    assert not refused.dead_letter


async def test_expiry_is_on_redis_clock(intake: Intake, job: Job) -> None:
    assert isinstance(await intake.accept(raw(job), 6000), Entry)
    refused = await intake.accept(raw(job), 6001)
    assert statuses(refused) == [Status.EXPIRED, Status.EXPIRED]


async def test_a_bad_row_does_not_fail_its_neighbours(intake: Intake, job: Job) -> None:
    ids = np.array([2, 3, 99, 3, 2, 100, 3, *range(9)], np.uint16)
    entry = await intake.accept(raw(replace(job, ids=ids, lengths=np.array([4, 3, 9], np.uint32))), 5000)
    assert isinstance(entry, Entry)
    assert statuses(entry) == [Status.OK, Status.INVALID_INPUT, Status.INPUT_TOO_LONG]
    assert entry.waiting_rows().tolist() == [0]
    result = entry.result(b"f" * 16)
    assert "out of vocabulary" in result.message(1)
    assert "maximum context length is 8" in result.message(2)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (TruncationSide.MODEL, [0, 1, 2, 3]),
        (TruncationSide.RIGHT, [0, 1, 2, 3]),
        (TruncationSide.LEFT, [5, 6, 7, 8]),
    ],
)
async def test_long_ids_are_cut_when_asked(intake: Intake, job: Job, side: TruncationSide, expected: list[int]) -> None:
    long = replace(
        job,
        ids=np.arange(9, dtype=np.uint16),
        lengths=np.array([9], np.uint32),
        long_inputs=LongInputs.TRUNCATE,
        truncate_to=4,
        truncation_side=side,
    )
    entry = await intake.accept(raw(long), 5000)
    assert isinstance(entry, Entry)
    assert entry.tokens.ids.tolist() == expected
    assert entry.rows["flags"].tolist() == [1]


async def test_long_texts_are_cut_when_asked(intake: Intake, job: Job) -> None:
    texts = ("a b c d e f g h", "a")
    long = replace(job, ids=None, texts=texts, lengths=text_lengths(texts), long_inputs=LongInputs.TRUNCATE)
    entry = await intake.accept(raw(long), 5000)
    assert isinstance(entry, Entry)
    assert entry.tokens.lengths.tolist() == [8, 3]
    assert entry.tokens.ids[[0, 7]].tolist() == [2, 3]  # the special tokens stay
    assert entry.rows["flags"].tolist() == [1, 0]


async def test_one_vector_an_input_is_not_served_with_pooling_all(wordpiece_json: str, job: Job) -> None:
    intake = make(wordpiece_json, replace(RECIPE, pooling=(Pooling.ALL,)))
    fingerprint = ModelCard("m", replace(RECIPE, pooling=(Pooling.ALL,)), wordpiece_json, "r").fingerprint
    refused = await intake.accept(raw(replace(job, fingerprint=fingerprint)), 5000)
    assert statuses(refused) == [Status.NOT_SERVED] * 2
    per_token = replace(job, fingerprint=fingerprint, options=VectorOptions(per_token=True))
    assert isinstance(await intake.accept(raw(per_token), 5000), Entry)


async def test_a_damaged_job_is_answered_when_its_sender_is_known(intake: Intake, job: Job) -> None:
    entry = raw(job)
    entry.fields[b"b"] = b"junk"
    refused = await intake.accept(entry, 5000)
    assert isinstance(refused, Refused)
    assert refused.dead_letter
    assert statuses(refused) == [Status.INVALID_INPUT] * 2
    assert refused.reply_to == REPLY


async def test_junk_is_a_dead_letter_without_an_answer(intake: Intake) -> None:
    refused = await intake.accept(RawEntry(Lane.BULK, b"1-0", {b"x": b"y"}), 5000)
    assert isinstance(refused, Refused)
    assert refused.dead_letter
    assert refused.answer is None


async def test_replies_go_to_reply_streams_only(intake: Intake, job: Job) -> None:
    refused = await intake.accept(raw(job, reply_to="t:{m}:q:i"), 5000)
    assert isinstance(refused, Refused)
    assert refused.dead_letter
    assert refused.reply_to == ""


async def test_a_tokenizer_that_panics_fails_its_job_alone(wordpiece_json: str, job: Job) -> None:
    class Panic(BaseException):
        """Like pyo3's, which is no `Exception`."""

    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("a private text")

    intake = make(wordpiece_json, RECIPE)
    texts = ("the",)
    as_text = replace(job, texts=texts, ids=None, lengths=text_lengths(texts), fingerprint=bytes(16))
    intake._tokenizer.encode = panic  # type: ignore[method-assign] # as a defect of the library would
    refused = await intake.accept(raw(as_text), 5000)
    assert statuses(refused) == [Status.FAILED]
    assert isinstance(refused, Refused)
    assert refused.reason == "The job could not be prepared: Panic."
    assert isinstance(await intake.accept(raw(job), 5000), Entry)


@pytest.mark.parametrize("policy", [LongInputs.ERROR, LongInputs.CHUNK])
async def test_a_text_the_tokenizer_refuses_fails_alone(job: Job, policy: LongInputs) -> None:
    words: Tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))  # noqa: S106 - a token it lacks
    words.pre_tokenizer = Whitespace()
    texts = ("a", "who knows", "b " * 9)
    with_texts = replace(job, ids=None, texts=texts, lengths=text_lengths(texts), first_input=7, long_inputs=policy)
    entry = await make(words.to_str(), RECIPE).accept(raw(with_texts), 5000)
    assert isinstance(entry, Entry)
    entry.store(entry.waiting_rows(), np.ones((len(entry.waiting_rows()), 4), np.float32))
    result = entry.result(b"f" * 16)
    long = Status.OK if policy is LongInputs.CHUNK else Status.INPUT_TOO_LONG
    assert result.rows["status"].tolist() == [Status.OK, Status.INVALID_INPUT, long]
    assert result.message(1).startswith("The input at index 8 cannot be tokenised")


async def test_a_text_is_refused_once_even_if_its_prompt_is_too_long(job: Job) -> None:
    words: Tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))  # noqa: S106 - a token it lacks
    words.pre_tokenizer = Whitespace()
    recipe = replace(RECIPE, prompts={"long": "b " * (RECIPE.max_length + 1)})
    texts = ("a", "who knows")
    with_texts = replace(job, ids=None, texts=texts, lengths=text_lengths(texts), prompt_name="long")
    entry = await make(words.to_str(), recipe).accept(raw(with_texts), 5000)
    assert isinstance(entry, Entry)
    assert entry.rows["status"].tolist() == [Status.INPUT_TOO_LONG, Status.INVALID_INPUT]
    assert entry.done
