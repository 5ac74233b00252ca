from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis

from embedstream.producer import Lane, Options, Producer, SyncProducer, VectorType
from embedstream.shared import results
from embedstream.shared.cards import ChatFormat, ModelCard, ModelEntry
from embedstream.shared.errors import (
    InputTooLong,
    InvalidInput,
    JobFailed,
    Misconfigured,
    NotServed,
    Overloaded,
    ResultTimeout,
    StaleCard,
    Unavailable,
)
from embedstream.shared.jobs import Job
from embedstream.shared.keys import Keys, models
from embedstream.shared.recipe import Pooling
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

pytestmark = pytest.mark.integration

Starter = Callable[..., Awaitable[Any]]


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        yield producer


def expected(card: ModelCard, texts: list[str], dim: int = 4) -> Any:
    tokens = TextTokenizer(card.tokenizer, card.recipe).encode(texts)
    sums = [ids.sum() % 977 for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    return np.stack([np.arange(1, dim + 1) * (1.0 + total) for total in sums])


async def lane_adds(redis: Redis, keys: Keys) -> int:
    """How many entries were ever added to the lanes."""
    total = 0
    for lane in Lane:
        info: Any = await redis.xinfo_stream(keys.lane(lane))
        total += info["entries-added"]
    return total


async def test_texts_come_back_as_a_matrix(producer: Producer, stub: Any, card: ModelCard) -> None:
    texts = ["the queue", "a", "", "the queue again"]
    vectors = await producer.embed(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(card, texts))
    vectors *= 2  # the caller's own


async def test_a_single_text_is_a_list_of_one(producer: Producer, stub: Any, card: ModelCard) -> None:
    np.testing.assert_allclose(await producer.embed("the queue"), expected(card, ["the queue"]))


async def test_inputs_may_come_from_a_generator(producer: Producer, stub: Any, card: ModelCard) -> None:
    inputs: Any = (text for text in ("a", "b"))
    np.testing.assert_allclose(await producer.embed(inputs), expected(card, ["a", "b"]))


@pytest.mark.parametrize(("option", "value"), [("lane", "fast"), ("dtype", "int8")])
async def test_wrong_choices_are_named(producer: Producer, stub: Any, option: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{option} is '{value}'; choose from (interactive|float32), ") as caught:
        await producer.embed("a", **{option: value})  # type: ignore[arg-type] # that is what is wrong
    assert caught.value.param == option


async def test_a_model_nobody_serves_is_named(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings, model="other") as producer:
        with pytest.raises(Unavailable, match=r"`other` \(announced: `alias`, `m`\)"):
            await producer.embed("a")


def test_what_is_no_url_of_redis_is_told_without_it() -> None:
    with pytest.raises(Misconfigured, match=r"must begin with one of redis://, rediss://, unix://\.$"):
        Producer("user:secret@localhost:6379")


async def test_a_refused_password_is_no_unreachable_redis(settings: Settings, redis: Redis, redis_url: str) -> None:
    await redis.acl_setuser("locked", enabled=True, passwords=["+right"], keys=["*"], commands=["+@all"])
    async with Producer(
        redis_url.replace("unix://", "unix://locked@") + "?password=wrong", settings=settings
    ) as producer:
        with pytest.raises(Unavailable, match="Redis refuses us"):
            await producer.embed("a")
    await redis.acl_deluser("locked")


async def test_no_inputs_give_no_rows(producer: Producer, stub: Any) -> None:
    assert (await producer.embed([])).shape == (0, 4)
    assert (await producer.embed([], dimensions=2)).shape == (0, 2)
    assert await producer.embed_tokens([]) == []


async def test_many_texts_keep_their_order(producer: Producer, stub: Any, card: ModelCard) -> None:
    texts = [" ".join("abcdefg"[: number % 7 + 1]) + f" {number % 10}" for number in range(1000)]
    np.testing.assert_allclose(await producer.embed(texts), expected(card, texts))
    assert len(stub.seen) == 16
    assert {job.count for job in stub.seen} == {16}


async def test_token_ids_are_embedded_as_they_are(producer: Producer, stub: Any) -> None:
    inputs: list[Any] = [[5, 6], np.array([7])]
    vectors = await producer.embed(inputs)
    np.testing.assert_allclose(vectors[:, 0], [12, 8])


@pytest.mark.parametrize(
    "inputs",
    [
        np.array([[5, 6], [7, 8]], np.uint16),
        np.array([[5, 6], [7, 8]], np.int64)[::-1][::-1],
        [np.array([5, 6], np.int32), np.array([7, 1, 7], np.uint64)],
        (np.array([5, 6]), [8, 7]),
        np.array([np.array([4, 5, 2]), np.array([15])], object),
    ],
)
async def test_ids_may_be_arrays_of_any_shape(producer: Producer, stub: Any, inputs: Any) -> None:
    vectors = await producer.embed(inputs)
    assert vectors[:, 0].tolist() == [12, 16]


@pytest.mark.parametrize("kind", [object, str])
async def test_texts_may_be_an_array(producer: Producer, stub: Any, card: ModelCard, kind: Any) -> None:
    texts = ["the queue", "a"]
    np.testing.assert_allclose(await producer.embed(np.array(texts, kind)), expected(card, texts))


async def test_options_travel_with_the_job(producer: Producer, stub: Any) -> None:
    vectors = await producer.embed(["a"], dimensions=2, normalize=True, dtype="float16", lane="bulk", timeout_s=7)
    assert vectors.dtype == np.float16
    assert vectors.shape == (1, 2)
    (job,) = stub.seen
    assert job.options.dtype is VectorType.FLOAT16
    assert job.options.normalize is True
    assert job.lane is Lane.BULK
    assert 6000 < job.ttl_ms <= 7000


async def test_long_inputs_are_cut_when_asked(producer: Producer, stub: Any) -> None:
    await producer.embed(["a b c d e f"], truncate_prompt_tokens=5)
    assert stub.seen[0].lengths.tolist() == [5]


async def test_token_vectors_come_as_a_list(producer: Producer, stub: Any) -> None:
    matrices = await producer.embed_tokens(["a b", "a"])
    assert [matrix.shape for matrix in matrices] == [(4, 4), (3, 4)]


async def test_the_stream_covers_every_input_once(producer: Producer, stub: Any, card: ModelCard) -> None:
    texts = [f"{number}" for number in range(200)]
    found = np.zeros((200, 4))
    pieces = 0
    async for piece in producer.stream(texts):
        found[piece.first : piece.first + len(piece.vectors)] += piece.vectors
        pieces += 1
    assert pieces == 4
    np.testing.assert_allclose(found, expected(card, texts))


async def test_results_are_never_mixed_up(producer: Producer, stub: Any, card: ModelCard) -> None:
    texts = [f"{number}" for number in range(300)]
    rows = await asyncio.gather(*(producer.embed(text) for text in texts))
    np.testing.assert_allclose(np.concatenate(rows), expected(card, texts))


@pytest.mark.parametrize(
    ("inputs", "options", "kind"),
    [
        (["a " * 20], {}, InputTooLong),
        ([[1] * 17], {}, InputTooLong),
        ([[1000]], {}, InvalidInput),
        ([[-1]], {}, InvalidInput),
        ([[2**70]], {}, InvalidInput),
        ([[]], {}, InvalidInput),
        (["a", [1]], {}, InvalidInput),
        ([["a"]], {}, InvalidInput),
        (["a\ud800"], {}, InvalidInput),
        (["a"], {"dimensions": 5}, InvalidInput),
        (["a"], {"dimensions": 0}, InvalidInput),
        (["a"], {"truncate_prompt_tokens": 17}, InvalidInput),
        (["a"], {"truncate_prompt_tokens": 2}, InvalidInput),
        (["a"], {"truncate_prompt_tokens": -2}, InvalidInput),
    ],
)
async def test_bad_input_is_refused_before_it_is_queued(
    producer: Producer, stub: Any, redis: Redis, keys: Keys, inputs: Any, options: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        await producer.embed(inputs, **options)
    assert await lane_adds(redis, keys) == 0


async def test_one_vector_an_input_is_not_served_with_pooling_all(
    producer: Producer, start_stub: Starter, card: ModelCard
) -> None:
    await start_stub(replace(card, recipe=replace(card.recipe, pooling=(Pooling.ALL,)), fingerprint=b""))
    with pytest.raises(NotServed, match="pooling `all`"):
        await producer.embed(["a"])
    assert len(await producer.embed_tokens(["a"])) == 1


async def test_a_failed_row_raises_its_reason(producer: Producer, stub: Any) -> None:
    def fail(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        first = parts[0]
        return [
            results.failed(
                job.request_id, first.fingerprint, job.index, job.count, job.first_input, 1, Status.FAILED, "on fire"
            )
        ]

    stub.on_job = fail
    with pytest.raises(JobFailed, match="on fire"):
        await producer.embed(["a"])


async def test_parts_that_come_twice_or_to_the_wrong_request_change_nothing(
    producer: Producer, stub: Any, card: ModelCard
) -> None:
    def repeat(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        first = parts[0]
        return [replace(first, request_id=b"x" * 16), replace(first, n_jobs=99), first, first]

    stub.on_job = repeat
    texts = [f"{number}" for number in range(100)]
    np.testing.assert_allclose(await producer.embed(texts), expected(card, texts))


async def test_no_answer_ends_in_a_timeout(producer: Producer, stub: Any) -> None:
    stub.on_job = lambda *_: None
    with pytest.raises(ResultTimeout, match="1 of 1 jobs"):
        await producer.embed(["a"], timeout_s=0.3)


async def test_nobody_alive_is_said_at_once(settings: Settings, redis_url: str) -> None:
    async with Producer(redis_url, settings=settings) as producer:
        with pytest.raises(Unavailable, match="announced a model"):
            await producer.embed(["a"])


@pytest.mark.parametrize(
    "entry",
    ["junk", '{"model":"m","fingerprint":"no hex","pieces":1}', '{"model":"m","fingerprint":"00","pieces":"x"}'],
)
async def test_an_unreadable_announcement_is_a_trouble_and_no_end(
    producer: Producer, start_stub: Starter, redis: Redis, keys: Keys, card: ModelCard, entry: str
) -> None:
    await redis.hset(models(keys.prefix), "m", entry)
    with pytest.raises(Unavailable, match="announced"):
        await producer.embed("a")
    await start_stub()
    await redis.hset(models(keys.prefix), "another model", entry)
    await redis.zadd(keys.live, {"strange": 2**60})
    await redis.set(keys.heartbeat("strange"), entry)
    np.testing.assert_allclose(await producer.embed("a"), expected(card, ["a"]))


async def test_the_current_revision_is_that_of_the_living(
    producer: Producer, start_stub: Starter, redis: Redis, keys: Keys, card: ModelCard
) -> None:
    """A consumer that came and went must not leave its revision behind for those that stay."""
    await start_stub()
    gone = ModelEntry("m", "ab" * 16, 1)
    await redis.hset(models(keys.prefix), "m", gone.encode())
    np.testing.assert_allclose(await producer.embed("a"), expected(card, ["a"]))


async def test_an_alias_added_later_is_known(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await producer.embed("a")
    entry = ModelEntry("m", stub.card.fingerprint.hex(), 1)
    await redis.hset(models(keys.prefix), "late", entry.encode())
    await producer.fleet.refresh()
    assert producer.fleet.served is not None
    assert "late" in producer.fleet.served.names


async def test_a_model_nobody_serves_any_more_is_no_choice(
    producer: Producer, stub: Any, redis: Redis, keys: Keys, card: ModelCard
) -> None:
    await redis.hset(models(keys.prefix), "old", ModelEntry("old", "ab" * 16, 1).encode())
    np.testing.assert_allclose(await producer.embed("a"), expected(card, ["a"]))


async def test_two_models_that_are_served_must_be_told_apart(
    settings: Settings, redis_url: str, stub: Any, keys: Keys, card: ModelCard, stub_consumers: Any
) -> None:
    async with stub_consumers(redis_url, Keys(keys.prefix, "n")) as start:
        await start(replace(card, model="n"))
        async with Producer(settings=settings) as producer:
            with pytest.raises(Unavailable, match="Several models are served"):
                await producer.embed("a")
        async with Producer(settings=settings, model="n") as producer:
            np.testing.assert_allclose(await producer.embed("a"), expected(card, ["a"]))


async def test_closing_while_the_first_requests_begin_leaves_nothing(
    settings: Settings, stub: Any, redis: Redis, keys: Keys
) -> None:
    producer = Producer(settings=settings)
    await producer.open()
    await redis.client_pause(200)
    asked = [asyncio.create_task(producer.embed("a", timeout_s=20)) for _ in range(3)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(15):
        await producer.close()
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert [key async for key in redis.scan_iter(f"{keys.base}:r:*")] == []


async def test_a_replaced_model_has_its_own_lane(
    settings: Settings, redis_url: str, redis: Redis, keys: Keys, card: ModelCard, stub_consumers: Any
) -> None:
    other = replace(card, model="n")
    async with Producer(settings=settings) as producer:
        async with stub_consumers(redis_url, keys) as start:
            await start(card)
            np.testing.assert_allclose(await producer.embed("a"), expected(card, ["a"]))
        await redis.delete(models(keys.prefix))
        async with stub_consumers(redis_url, Keys(keys.prefix, "n")) as start:
            await start(other)
            await producer.fleet.refresh()
            np.testing.assert_allclose(await producer.embed("b", timeout_s=20), expected(other, ["b"]))


async def test_a_damaged_part_harms_no_other_of_its_entry(producer: Producer, stub: Any, card: ModelCard) -> None:
    serve = stub.serve

    async def with_damage(lane: bytes, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        frame = results.frame
        try:
            results.frame = lambda parts: frame([b"ER\x02 of a later version", *parts])
            await serve(lane, entry_id, fields)
        finally:
            results.frame = frame

    stub.serve = with_damage
    np.testing.assert_allclose(await producer.embed("a", timeout_s=2), expected(card, ["a"]))


@pytest.mark.parametrize(
    "inputs",
    [[[1.7, 2.9]], [["5", "6"]], [[True, False]], [1, 2, 3], [[[1]]], [None], [{"a": 1}], [[2**65]], [[1, [2, 3]]]],
    ids=repr,
)
async def test_what_is_no_token_id_is_not_taken_for_one(producer: Producer, stub: Any, inputs: Any) -> None:
    with pytest.raises(InvalidInput, match="token ids"):
        await producer.embed(inputs)
    assert stub.seen == []


async def test_a_producer_is_opened_once(settings: Settings, stub: Any) -> None:
    producer = Producer(settings=settings)
    async with producer:
        await producer.embed("a")
    await producer.close()
    with pytest.raises(RuntimeError, match="opened once"):
        await producer.open()


def test_a_blocking_producer_is_closed_as_often_as_one_likes(settings: Settings) -> None:
    producer = SyncProducer(settings=settings)
    producer.close()
    with producer:
        producer.close()
    producer.close()
    with pytest.raises(RuntimeError, match="opened once"):
        producer.open()


async def test_redis_away_is_said_at_once(settings: Settings) -> None:
    async with Producer("unix:///nowhere/v.sock", settings=settings) as producer:
        with pytest.raises(Unavailable, match="Redis"):
            await producer.embed(["a"])


async def test_a_full_lane_refuses_the_whole_request(settings: Settings, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    async with Producer(settings=settings.model_copy(update={"max_lane_bytes": 1000})) as producer:
        filling = asyncio.create_task(producer.embed([f"{n}" for n in range(64 * 5)]))  # an empty lane takes all of it
        while not filling.done() and await redis.xlen(keys.lane(Lane.INTERACTIVE)) < 5:
            await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match=r"limit of 1,000 bytes \(--max-lane-bytes\)"):
            await producer.embed([f"{n}" for n in range(128)])
        assert await redis.xlen(keys.lane(Lane.INTERACTIVE)) == 5
        stub.resume()
        assert len(await filling) == 64 * 5


async def test_a_new_revision_is_tokenised_for_again(producer: Producer, start_stub: Starter, card: ModelCard) -> None:
    old = await start_stub()
    await producer.embed(["a"])
    newer = replace(card, revision="r2", fingerprint=b"")
    old.card = newer  # answers `stale_card` to what was made for the old one
    await start_stub(newer)
    vectors = await producer.embed(["the queue"])
    np.testing.assert_allclose(vectors, expected(newer, ["the queue"]))


@pytest.mark.parametrize("template", ["{{ 1 }}", "{{ 2 }}"])
async def test_texts_made_of_chat_messages_are_for_a_model_that_makes_the_same(
    producer: Producer, start_stub: Starter, card: ModelCard, template: str
) -> None:
    chat = ChatFormat({"default": "{{ 1 }}"}, {})
    old = await start_stub(replace(card, chat=chat, fingerprint=b""))
    await producer.embed(["a"])
    prepared = await producer.prepare(["the queue"], Options(chat=chat))
    newer = replace(card, revision="r2", chat=ChatFormat({"default": template}, {}), fingerprint=b"")
    old.card = newer
    await start_stub(newer)
    if newer.chat == chat:
        np.testing.assert_allclose((await producer.run(prepared)).vectors, expected(newer, ["the queue"]))
    else:
        with pytest.raises(Unavailable, match="other texts of chat messages"):
            await producer.run(prepared)


async def test_a_stream_is_tokenised_again_while_nothing_has_come(
    producer: Producer, start_stub: Starter, card: ModelCard
) -> None:
    old = await start_stub()
    await producer.embed(["a"])
    newer = replace(card, revision="r2", fingerprint=b"")
    old.card = newer
    await start_stub(newer)
    pieces = [piece async for piece in producer.stream(["the queue"])]
    assert [(piece.first, len(piece.vectors)) for piece in pieces] == [(0, 1)]


async def test_a_thousand_who_ask_for_a_lost_redis_share_one_question(settings: Settings) -> None:
    async with Producer("unix:///nowhere/v.sock", settings=settings) as producer:
        asked = 0
        ask = producer.fleet._refresh

        async def counting() -> None:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.05)
            await ask()

        producer.fleet._refresh = counting  # type: ignore[method-assign] # to count
        await asyncio.sleep(0.2)
        answers = await asyncio.gather(*(producer.embed("a") for _ in range(1000)), return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert asked <= 3  # the background's and ours


async def test_ids_for_an_old_revision_are_the_callers_to_make(producer: Producer, stub: Any, card: ModelCard) -> None:
    await producer.embed(["a"])
    stub.card = replace(card, revision="r2", fingerprint=b"")
    with pytest.raises(StaleCard, match="another revision"):
        await producer.embed([[5, 6]])


async def test_aliases_lead_to_the_same_model(settings: Settings, stub: Any, card: ModelCard) -> None:
    async with Producer(settings=settings, model="alias") as producer:
        np.testing.assert_allclose(await producer.embed("a"), expected(card, ["a"]))


async def test_closing_leaves_nothing_in_redis(settings: Settings, stub: Any, redis: Redis, keys: Keys) -> None:
    async with Producer(settings=settings) as producer:
        await producer.embed("a")
        assert len([key async for key in redis.scan_iter(f"{keys.base}:r:*")]) == 1
    assert [key async for key in redis.scan_iter(f"{keys.base}:r:*")] == []


async def test_closing_ends_what_is_under_way(settings: Settings, stub: Any) -> None:
    stub.on_job = lambda *_: None
    producer = Producer(settings=settings)
    await producer.open()
    waiting = asyncio.create_task(producer.embed("a"))
    while not stub.seen:
        await asyncio.sleep(0.01)
    await producer.close()
    with pytest.raises(Unavailable, match="closed"):
        await waiting


async def test_a_closed_producer_says_so(settings: Settings, stub: Any) -> None:
    producer = Producer(settings=settings)
    with pytest.raises(Unavailable, match="not open"):
        await producer.embed("a")
    await producer.close()


async def test_cards_are_fetched_once_and_kept_on_disk(settings: Settings, stub: Any, redis: Redis, keys: Keys) -> None:
    async with Producer(settings=settings) as first:
        await first.embed("a")
    before: Any = await redis.info("commandstats")
    async with Producer(settings=settings) as second:
        await second.embed("a")
    after: Any = await redis.info("commandstats")
    assert after["cmdstat_get"]["calls"] == before["cmdstat_get"]["calls"]


async def test_the_blocking_producer_does_the_same(settings: Settings, stub: Any, card: ModelCard) -> None:
    def work() -> None:
        with SyncProducer(settings=settings) as producer:
            np.testing.assert_allclose(producer.embed(["a", "b"]), expected(card, ["a", "b"]))
            assert [matrix.shape for matrix in producer.embed_tokens(["a"])] == [(3, 4)]
            assert sum(len(piece.vectors) for piece in producer.stream([str(n) for n in range(100)])) == 100
            with pytest.raises(InputTooLong):
                producer.embed("a " * 20)
        with pytest.raises(RuntimeError, match="not open"):
            producer.embed("a")

    await asyncio.to_thread(work)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e9])
async def test_a_time_no_request_can_have_is_refused(producer: Producer, stub: Any, timeout_s: float) -> None:
    with pytest.raises(InvalidInput, match="timeout_s"):
        await producer.embed("a", timeout_s=timeout_s)
    with pytest.raises(InvalidInput, match="result_ttl_s"):
        await producer.submit("a", result_ttl_s=2**31 + 1)
    assert stub.seen == []


async def test_the_time_of_a_request_runs_from_its_arrival(producer: Producer, stub: Any) -> None:
    prepared = await producer.prepare(["a"], Options(timeout_s=0.05))
    await asyncio.sleep(0.06)
    with pytest.raises(ResultTimeout, match="before it could be sent"):
        await producer.run(prepared)
    assert stub.seen == []


async def test_a_stream_never_mixes_two_revisions(producer: Producer, stub: Any) -> None:
    stub.on_job = lambda job, parts: [replace(part, fingerprint=bytes([job.index]) * 16) for part in parts]
    got = []

    async def read() -> None:
        async for piece in producer.stream(["a"] * 65):  # two jobs
            got.append(piece)

    with pytest.raises(StaleCard, match="Two revisions"):
        await read()
    assert len(got) == 1
