from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from embedstream.consumer import budget as budgets
from embedstream.consumer import pace as paces
from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.device_thread import MOST_UNDELIVERED, DeviceThread, Done, Trial
from embedstream.consumer.entries import Entry
from embedstream.consumer.faults import BrokenDevice
from embedstream.consumer.notices import Cancelled
from embedstream.consumer.pace import Pace
from embedstream.consumer.row_queue import Dropped, RowQueue
from embedstream.consumer.watchdog import State, Watchdog
from embedstream.shared.lanes import Lane

from .made import Device, contents, entry

Seen = list[tuple[bytes, int]]


def rows(done: Done) -> Seen:
    return [(one.raw.entry_id, row) for piece in done.pieces for one, row, _ in contents(piece.batch)]


@dataclass
class Attempt:
    """A trial that is told what to run."""

    entries: list[Entry]
    alone: bool = False
    suspected_row: int | None = None
    marks: list[int] = field(default_factory=list)

    async def begin(self) -> list[Entry]:
        return self.entries

    async def mark(self, row: int) -> None:
        self.marks.append(row)


class Bench:
    """A device thread, and what it has told."""

    def __init__(self, budget: int = 100, device: Device | None = None) -> None:
        self.device = Device() if device is None else device
        self.pace = Pace(budget)
        self.queue = RowQueue(Budget(budget), self.pace)
        self.watchdog = Watchdog(10)
        self.cancelled = Cancelled()
        self.news: list[Done | Trial | list[tuple[Entry, Dropped]]] = []
        self.delivers = True
        self.thread = DeviceThread(
            self.queue, self.device, self.pace, self.watchdog, lambda: 100.0, self.cancelled, self
        )

    def taken(self) -> None:
        """Nothing to do with it."""

    def dropped(self, dropped: list[tuple[Entry, Dropped]]) -> None:
        self.news.append(dropped)

    def done(self, done: Done) -> None:
        self.news.append(done)
        if self.delivers:
            self.thread.delivered()

    def trial_ended(self, trial: Trial) -> None:
        self.news.append(trial)

    @property
    def batches(self) -> list[Seen]:
        return [rows(news) for news in self.news if isinstance(news, Done)]

    async def came(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.news) < count:
                await asyncio.sleep(0.005)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.thread.abandon()
    if bench.thread._thread.is_alive():
        async with asyncio.timeout(20):
            await asyncio.wait([bench.thread.ended])


async def test_what_does_not_fit_the_memory_lowers_the_budget_once_a_batch(bench: Bench) -> None:
    def before(batch: MicroBatch) -> None:
        if batch.cost > 30:
            raise MemoryError

    bench.device.before = before
    bench.thread.add(Lane.BULK, [entry([10] * 10)])
    bench.thread.start()
    await bench.came(1)
    assert sorted(bench.batches[0]) == [(b"1-0", row) for row in range(10)]
    assert bench.queue.budget.now == 75  # by the batch; its halves failed too, and tell nothing new


async def test_a_lowered_budget_rises_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "GOOD_BATCHES", 3)
    full = True

    def before(_: MicroBatch) -> None:
        nonlocal full
        if full:
            full = False
            raise MemoryError

    bench.device.before = before
    bench.thread.add(Lane.BULK, [entry([10] * 10)])
    bench.thread.start()
    await bench.came(1)
    lowered = bench.queue.budget.now
    for number in range(12):
        bench.thread.add(Lane.BULK, [entry([10], number=number + 1)])
        await bench.came(number + 2)
    assert lowered < bench.queue.budget.now == 100


async def test_a_row_that_does_not_fit_says_nothing_of_the_budget(bench: Bench) -> None:
    def before(_: MicroBatch) -> None:
        raise MemoryError

    bench.device.before = before
    bench.thread.add(Lane.BULK, [entry([90])])
    bench.thread.start()
    await bench.came(1)
    assert bench.queue.budget.now == 100


async def test_suspects_run_before_all_others_and_with_none_of_them(bench: Bench) -> None:
    trial = Attempt([entry([10] * 3, number=1), entry([10] * 2, number=2)])
    bench.thread.add(Lane.INTERACTIVE, [entry([10] * 2)])
    bench.thread.try_apart(trial)
    bench.thread.start()
    await bench.came(3)
    assert bench.news[1] is trial
    assert {entry_id for entry_id, _ in bench.batches[0]} == {b"2-0", b"3-0"}
    assert {entry_id for entry_id, _ in bench.batches[1]} == {b"1-0"}
    assert trial.marks == []


async def test_a_suspect_alone_runs_row_by_row_each_noted_first(bench: Bench) -> None:
    trial = Attempt([entry([10, 11, 12, 13])], alone=True, suspected_row=1)
    noted: list[list[int]] = []
    bench.device.before = lambda _: noted.append(list(trial.marks))
    bench.thread.try_apart(trial)
    bench.thread.start()
    await bench.came(5)
    assert [[row for _, row in batch] for batch in bench.batches] == [[0], [2], [3], [1]]
    assert noted == [[0], [0, 2], [0, 2, 3], [0, 2, 3, 1]]
    assert bench.news[-1] is trial


@pytest.mark.parametrize("apart", [True, False])
async def test_suspects_do_not_tell_what_the_device_gets_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """However much waits behind them: by so small batches callers would be refused."""
    monkeypatch.setattr(paces, "_WINDOW_S", 0.0)  # any stretch of unbroken work tells
    rates: list[float] = []
    bench.device.before = lambda _: rates.append(bench.pace.tokens_per_s())
    for number in range(3):
        if apart:
            bench.thread.try_apart(Attempt([entry([10], number=number)]))
        else:
            bench.thread.add(Lane.INTERACTIVE, [entry([100], number=number)])
    bench.thread.add(Lane.BULK, [entry([100] * 3, number=3)])
    bench.thread.start()
    await bench.came(9 if apart else 6)
    assert rates[0] == 0
    assert (rates[2] == 0) is apart


async def test_trials_with_nothing_to_run_take_no_place(bench: Bench) -> None:
    for _ in range(2 * MOST_UNDELIVERED):
        bench.thread.try_apart(Attempt([]))
    bench.thread.add(Lane.BULK, [entry([10])])
    bench.thread.start()
    await bench.came(2 * MOST_UNDELIVERED + 1)
    assert len(bench.batches) == 1


async def test_what_was_not_begun_can_be_taken_back(bench: Bench) -> None:
    go = threading.Event()

    def before(_: MicroBatch) -> None:
        go.wait(20)

    bench.device.before = before
    running, waiting = entry([10] * 15), entry([10], Lane.BULK, 1)
    trial = Attempt([entry([10], number=2)])
    bench.thread.add(Lane.INTERACTIVE, [running])
    bench.thread.start()
    async with asyncio.timeout(20):
        while not bench.device.batches:
            await asyncio.sleep(0.005)
    bench.thread.add(Lane.BULK, [waiting])
    bench.thread.try_apart(trial)
    entries, trials = bench.thread.release()
    assert [one.raw.entry_id for one in entries] == [b"2-0"]
    assert trials == [trial]
    go.set()
    bench.thread.finish()
    await bench.thread.ended
    assert sorted(row for batch in bench.batches for _, row in batch) == list(range(15))  # what was begun is finished


async def test_cancelled_and_expired_jobs_never_reach_the_device(bench: Bench) -> None:
    gone, late = entry([10], request_id=b"gone" * 4), entry([10], Lane.BULK, 1, ttl_ms=50)
    bench.cancelled.add(b"gone" * 4, 10**15)
    bench.thread.add(Lane.INTERACTIVE, [gone, entry([10], number=2)])
    bench.thread.add(Lane.BULK, [late])
    bench.thread.start()
    await bench.came(2)
    assert [(one.raw.entry_id, why) for one, why in bench.news[0]] == [  # type: ignore[union-attr] # dropped is first
        (b"1-0", Dropped.CANCELLED),
        (b"2-0", Dropped.EXPIRED),
    ]
    assert bench.batches == [[(b"3-0", 0)]]


async def test_a_lost_device_ends_the_thread_with_its_error(bench: Bench) -> None:
    def before(_: MicroBatch) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    bench.device.before = before
    one, two = entry([90]), entry([90], Lane.BULK, 1)
    bench.thread.add(Lane.INTERACTIVE, [one])
    bench.thread.add(Lane.BULK, [two])
    bench.thread.start()
    with pytest.raises(BrokenDevice):
        await bench.thread.ended
    assert bench.news == []
    assert bench.thread.release() == ([two], [])  # what was on the device stays on its lane, the rest goes back


async def test_no_more_than_four_results_wait_for_redis(bench: Bench) -> None:
    bench.delivers = False
    bench.thread.add(Lane.BULK, [entry([90], number=number) for number in range(8)])
    bench.thread.start()
    await bench.came(MOST_UNDELIVERED)
    await asyncio.sleep(0.05)
    assert len(bench.device.batches) == MOST_UNDELIVERED
    bench.thread.delivered()
    await bench.came(MOST_UNDELIVERED + 1)


async def test_the_watchdog_sees_each_pass_with_its_prediction(bench: Bench) -> None:
    """Each part of a failed batch is a pass of its own, and a failure ends one as well."""
    looks: list[State] = []
    bench.watchdog.turn()

    def before(batch: MicroBatch) -> None:
        bench.watchdog.turn()
        looks.append(bench.watchdog.look(9))
        bench.watchdog.turn()
        looks.append(bench.watchdog.look(9))
        if batch.n_rows > 1:
            raise ValueError("a bad row")

    bench.pace.observe(100, 100, 0.1)
    bench.device.before = before
    bench.thread.add(Lane.BULK, [entry([10, 10])])
    bench.thread.start()
    await bench.came(1)
    assert looks == [State.MOVING] * 6
    assert bench.watchdog._batch_limit_s is None
    predicted = bench.pace.predict_s(10)
    assert predicted is not None
    assert predicted < 0.1  # and from those that succeeded it has learned
