from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.hand import Hand
from embedstream.consumer.intake import Intake, Refused
from embedstream.consumer.leases import Leases
from embedstream.consumer.suspects import GROUPS, MOST_WAITING, Suspects, SuspectTrial
from embedstream.shared.connections import connect, create_group
from embedstream.shared.jobs import Job
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.results import Status
from embedstream.shared.tokenization import TextTokenizer

from .made import RECIPE, card, job_of, pending

pytestmark = pytest.mark.integration

STREAM = Lane.INTERACTIVE
FOUR_ROWS = [[1, 2], [3], [4, 5, 6], [7]]


def named(numbers: Sequence[int], deaths: int = 1) -> list[RawEntry]:
    return [RawEntry(STREAM, f"{number}-0".encode(), {}, deaths) for number in numbers]


def numbers(trial: SuspectTrial | None) -> list[int]:
    return [] if trial is None else [int(raw.entry_id[:-2]) for raw in trial.raws]


class Bench:
    """Suspects before a real Valkey, and what they have told."""

    def __init__(self, redis: Redis, keys: Keys, tokenizer: str, most_deaths: int = 4) -> None:
        self.redis, self.keys, self.tokenizer = redis, keys, tokenizer
        self.leases = Leases(redis, keys, "me", Hand(), 300_000)
        intake = Intake(card(tokenizer), TextTokenizer(tokenizer, RECIPE), keys.reply(""))
        self.now_ms = 0.0
        self.cancelled: dict[bytes, int] = {}
        self.finished: list[Entry | Refused] = []
        self.lost: list[RawEntry] = []
        self.suspects = Suspects(
            redis,
            keys,
            self.leases,
            intake,
            lambda: self.now_ms,
            self.cancelled,
            most_deaths,
            self._finish,
            self.lost.extend,
        )

    async def _finish(self, what: Entry | Refused) -> None:
        self.finished.append(what)

    async def suspect(
        self, deaths: int = 1, inputs: list[list[int]] = FOUR_ROWS, number: int = 0, noted: str = "", **of_job: Any
    ) -> RawEntry:
        """An entry that is pending for us after so many deaths."""
        job: Job = job_of(self.tokenizer, inputs, number, **of_job)
        fields = dict(zip((b"h", b"b"), job.encode(), strict=True)) | {b"rt": self.keys.reply("me").encode()}
        stream = self.keys.lane(STREAM)
        sent: Any = await self.redis.xadd(stream, fields)  # type: ignore[arg-type] # invariant in its keys
        await self.redis.xreadgroup(GROUP, "me", {stream: ">"}, 1)
        await self.redis.xclaim(stream, GROUP, "me", 0, [sent], retrycount=deaths + 1)
        if noted:
            await self.redis.hset(self.keys.trials, sent, noted)
        return RawEntry(STREAM, sent, fields, deaths)

    async def begin(self, *raws: RawEntry) -> tuple[SuspectTrial, list[Entry]]:
        self.suspects.add(raws)
        trial = self.suspects.next_trial()
        assert trial is not None
        return trial, await trial.begin()

    async def count(self, raw: RawEntry) -> int:
        return (await pending(self.redis, self.keys))[raw.entry_id][1]

    async def noted(self, raw: RawEntry) -> Any:
        return await self.redis.hget(self.keys.trials, raw.entry_id.decode())


@pytest.fixture
async def redis(redis_url: str, keys: Keys) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    for lane in LANES:
        await create_group(client, keys.lane(lane), GROUP)
    yield client
    await client.aclose()


@pytest.fixture
def bench(redis: Redis, keys: Keys, wordpiece_json: str) -> Bench:
    return Bench(redis, keys, wordpiece_json)


async def test_after_one_death_they_run_in_groups_of_eight_one_after_the_other(bench: Bench) -> None:
    suspects = bench.suspects
    suspects.add(named(range(20)))
    seen = []
    while (trial := suspects.next_trial()) is not None:
        assert suspects.next_trial() is None
        assert not trial.alone
        seen.append(numbers(trial))
        trial.begun = True
        suspects.ended(trial)
    assert seen == [list(range(8)), list(range(8, 16)), list(range(16, 20))]


async def test_after_a_second_death_they_run_alone_and_nobody_loses_its_turn(bench: Bench) -> None:
    suspects = bench.suspects
    suspects.add(named([1]) + named([2, 3], deaths=2) + named(range(4, 14)))
    seen = []
    while (trial := suspects.next_trial()) is not None:
        seen.append((numbers(trial), trial.alone))
        trial.begun = True
        suspects.ended(trial)
    assert seen == [([1, *range(4, 11)], False), ([2], True), ([3], True), ([11, 12, 13], False)]


@pytest.mark.parametrize(
    ("most_deaths", "alone"), [(1, [True, True, True]), (2, [True, True, True]), (3, [False, True, True])]
)
async def test_a_low_limit_leaves_room_for_a_trial_alone(
    redis: Redis, keys: Keys, wordpiece_json: str, most_deaths: int, alone: list[bool]
) -> None:
    suspects = Bench(redis, keys, wordpiece_json, most_deaths).suspects
    for deaths, expected in enumerate(alone, start=1):
        suspects.add(named([1], deaths))
        trial = suspects.next_trial()
        assert trial is not None
        assert trial.alone is expected
        trial.begun = True
        suspects.ended(trial)


async def test_room_and_release(bench: Bench) -> None:
    suspects = bench.suspects
    assert suspects.room == MOST_WAITING
    suspects.add(named(range(MOST_WAITING + 5)))
    assert suspects.room == 0
    trial = suspects.next_trial()
    size = (MOST_WAITING + 4) // GROUPS  # of so many the groups are larger
    assert [raw.entry_id for raw in suspects.release()] == [f"{n}-0".encode() for n in range(size, MOST_WAITING + 5)]
    assert suspects.room == MOST_WAITING
    assert numbers(trial) == list(range(size))
    assert trial is not None
    suspects.ended(trial)  # it was not begun: its suspects wait again, in their order
    assert numbers(suspects.next_trial()) == list(range(8))  # few are left, and the groups small


async def test_an_attempt_is_booked_before_it_runs(bench: Bench) -> None:
    raws = [await bench.suspect(number=number) for number in range(3)]
    trial, entries = await bench.begin(*raws)
    assert [entry.raw for entry in entries] == raws
    assert trial.begun
    assert [await bench.count(raw) for raw in raws] == [3, 3, 3]
    assert bench.finished == []


async def test_while_redis_is_away_nothing_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    raws = [await bench.suspect(number=number) for number in range(3)]

    async def away(_: object) -> list[RawEntry]:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(bench.leases, "book", away)
        trial, entries = await bench.begin(*raws)
    assert entries == []
    bench.suspects.ended(trial)
    again = bench.suspects.next_trial()
    assert again is not None
    assert again.raws == raws
    assert [entry.raw for entry in await again.begin()] == raws


async def test_what_others_have_taken_is_let_go(bench: Bench) -> None:
    mine, stolen = await bench.suspect(number=1), await bench.suspect(number=2)
    await bench.redis.xclaim(bench.keys.lane(STREAM), GROUP, "thief", 0, [stolen.entry_id], justid=True)
    trial, entries = await bench.begin(mine, stolen)
    assert [entry.raw for entry in entries] == [mine]
    assert bench.lost == [stolen]
    assert trial.begun


async def test_those_nobody_waits_for_do_not_run(bench: Bench) -> None:
    late = await bench.suspect(number=1, ttl_ms=1000)
    gone = await bench.suspect(number=2)
    good = await bench.suspect(number=3)
    bench.now_ms = late.enqueued_ms + 1001
    bench.cancelled[(2).to_bytes(16, "little")] = 10**15
    _, entries = await bench.begin(late, gone, good)
    assert [entry.raw for entry in entries] == [good]
    expired, cancelled = bench.finished
    assert isinstance(expired, Refused)
    assert expired.answer is not None
    assert set(expired.answer.rows["status"]) == {Status.EXPIRED}
    assert not expired.dead_letter
    assert isinstance(cancelled, Entry)
    assert cancelled.reply_to == ""


@pytest.mark.parametrize("most_deaths", [2, 3, 4])
async def test_a_job_of_one_row_is_given_up_after_the_last_death_allowed(
    redis: Redis, keys: Keys, wordpiece_json: str, most_deaths: int
) -> None:
    bench = Bench(redis, keys, wordpiece_json, most_deaths)
    last = await bench.suspect(most_deaths - 1, [[5, 6]], 1)
    trial, entries = await bench.begin(last)
    assert [entry.raw for entry in entries] == [last]
    assert trial.alone
    bench.suspects.ended(trial)
    given_up = await bench.suspect(most_deaths, [[5, 6]], 2)
    trial, entries = await bench.begin(given_up)
    assert entries == []
    assert trial.begun
    (refused,) = bench.finished
    assert isinstance(refused, Refused)
    assert refused.dead_letter
    assert f"{most_deaths} consumers died" in refused.reason
    assert refused.reply_to == keys.reply("me")
    assert refused.answer is not None
    assert refused.answer.rows["status"].tolist() == [Status.FAILED]
    assert await bench.count(given_up) == most_deaths + 2  # asking whether it is still ours counts, and does no harm


async def test_the_rows_of_a_job_alone_are_noted_and_the_suspected_one_goes_last(bench: Bench) -> None:
    first = await bench.suspect(2)
    trial, _ = await bench.begin(first)
    assert trial.suspected_row is None
    for row in (0, 1):
        await trial.mark(row)
        assert await bench.noted(first) == str(row).encode()
    assert 0 < await bench.redis.ttl(bench.keys.trials) <= 86_400
    second = RawEntry(STREAM, first.entry_id, first.fields, 3)  # it died at row 1
    bench.suspects.ended(trial)
    trial, _ = await bench.begin(second)
    assert trial.suspected_row == 1
    await trial.mark(0)
    assert await bench.noted(first) == b"1,0"
    await trial.mark(1)
    assert await bench.noted(first) == b"1,1"


async def test_the_one_row_that_kills_is_given_up_alone(bench: Bench) -> None:
    raw = await bench.suspect(4, noted="2,2")
    trial, (entry,) = await bench.begin(raw)
    assert entry.waiting_rows().tolist() == [0, 1, 3]
    assert entry.rows["status"].tolist() == [Status.OK, Status.OK, Status.FAILED, Status.OK]
    assert "4 consumers died" in entry.dead_letter
    assert entry.dead_row == 2
    assert bench.finished == []
    assert await bench.count(raw) == 6  # should it not have been that row, this is the last attempt
    bench.suspects.ended(trial)
    _, entries = await bench.begin(RawEntry(STREAM, raw.entry_id, raw.fields, 5))
    assert entries == []
    assert isinstance(bench.finished[0], Refused)
    assert bench.finished[0].dead_letter


async def test_when_only_the_row_that_kills_is_left_the_job_needs_no_device(bench: Bench) -> None:
    raw = await bench.suspect(4, [[1] * 65, [2]], noted="1,1")  # 64 tokens are the most
    trial, entries = await bench.begin(raw)
    assert entries == []
    assert trial.begun
    (entry,) = bench.finished
    assert isinstance(entry, Entry)
    assert entry.rows["status"].tolist() == [Status.INPUT_TOO_LONG, Status.FAILED]
    assert entry.dead_row == 1


@pytest.mark.parametrize("noted", ["", "2", "2,3"])
async def test_deaths_at_different_rows_prove_nothing_about_any_of_them(bench: Bench, noted: str) -> None:
    raw = await bench.suspect(4, noted=noted)
    _, entries = await bench.begin(raw)
    assert entries == []
    (refused,) = bench.finished
    assert isinstance(refused, Refused)
    assert refused.answer is not None
    assert refused.answer.rows["status"].tolist() == [Status.FAILED] * 4
