"""The device's thread with a device that computes by itself: the next batch is there before one is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.device_thread import MOST_UNDELIVERED
from embedstream.consumer.faults import BrokenDevice
from embedstream.consumer.outcome import Embedded
from embedstream.shared.lanes import Lane

from .made import Device, contents, entry
from .test_device_thread import Attempt, Bench


class Gpu(Device):
    """Notes what is launched and what is waited for, by the entries' numbers."""

    overlaps = True

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.before_launch: Callable[[MicroBatch], None] = lambda _: None
        self.before_wait: Callable[[MicroBatch], None] = lambda _: None

    def embed(self, batch: MicroBatch) -> Embedded:
        self.events.append(f"embed {_name(batch)}")
        return super().embed(batch)

    def launch(self, batch: MicroBatch) -> Callable[[], Embedded]:
        self.events.append(f"launch {_name(batch)}")
        self.before_launch(batch)

        def wait() -> Embedded:
            self.events.append(f"wait {_name(batch)}")
            self.before_wait(batch)
            return super(Gpu, self).embed(batch)

        return wait


def _name(batch: MicroBatch) -> str:
    return "+".join(sorted({one.raw.entry_id.decode().partition("-")[0] for one, _, _ in contents(batch)}))


class Ahead(Bench):
    def __init__(self) -> None:
        super().__init__(device=Gpu())

    @property
    def gpu(self) -> Gpu:
        assert isinstance(self.device, Gpu)
        return self.device

    def comes(self, *numbers: int, tokens: int = 90) -> None:
        """A job for each number, of which each fills a batch by itself."""
        self.thread.add(Lane.BULK, [entry([tokens], number=number - 1) for number in numbers])


@pytest.fixture
async def ahead() -> AsyncIterator[Ahead]:
    bench = Ahead()
    yield bench
    bench.thread.abandon()
    if bench.thread._thread.is_alive():
        async with asyncio.timeout(20):
            await asyncio.wait([bench.thread.ended])


async def test_the_next_batch_is_launched_before_one_is_waited_for(ahead: Ahead) -> None:
    ahead.comes(1, 2, 3)
    ahead.thread.start()
    await ahead.came(3)

    assert ahead.gpu.events == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "wait 3"]
    assert ahead.batches == [[(b"1-0", 0)], [(b"2-0", 0)], [(b"3-0", 0)]]


async def test_little_that_waits_is_no_batch_yet(ahead: Ahead) -> None:
    def more(_: MicroBatch) -> None:
        ahead.gpu.before_wait = lambda _: None
        ahead.comes(3, tokens=10)  # comes while the first one runs

    ahead.gpu.before_wait = more
    ahead.comes(1)
    ahead.comes(2, tokens=10)
    ahead.thread.start()
    await ahead.came(2)

    assert ahead.gpu.events == ["launch 1", "wait 1", "launch 2+3", "wait 2+3"]


async def test_what_finds_no_memory_beside_another_batch_runs_alone(ahead: Ahead) -> None:
    def full(batch: MicroBatch) -> None:
        if _name(batch) == "2":
            raise MemoryError

    ahead.gpu.before_launch = full
    ahead.comes(1, 2, 3)
    ahead.thread.start()
    await ahead.came(3)

    assert ahead.gpu.events[:4] == ["launch 1", "launch 2", "wait 1", "embed 2"]
    assert ahead.batches == [[(b"1-0", 0)], [(b"2-0", 0)], [(b"3-0", 0)]]


async def test_a_batch_that_fails_when_it_is_waited_for_is_taken_apart(ahead: Ahead) -> None:
    def bad(batch: MicroBatch) -> None:
        if b"1-0" in {one.raw.entry_id for one, _, _ in contents(batch)} and batch.n_rows > 1:
            raise ValueError

    ahead.gpu.before_wait = ahead.gpu.before = bad
    ahead.thread.add(Lane.BULK, [entry([45, 45])])
    ahead.comes(2)
    ahead.thread.start()
    await ahead.came(2)

    assert sorted(ahead.batches[0]) == [(b"1-0", 0), (b"1-0", 1)]
    assert ahead.batches[1] == [(b"2-0", 0)]
    assert [event for event in ahead.gpu.events if event.endswith("1")] == ["launch 1", "wait 1", "embed 1", "embed 1"]


async def test_suspects_run_with_nothing_beside_them(ahead: Ahead) -> None:
    def suspect(_: MicroBatch) -> None:
        ahead.gpu.before_launch = lambda _: None
        ahead.thread.try_apart(Attempt([entry([90], number=8)]))

    ahead.gpu.before_launch = suspect
    ahead.comes(1, 2)
    ahead.thread.start()
    await ahead.came(4)

    assert ahead.gpu.events == ["launch 1", "wait 1", "embed 9", "launch 2", "wait 2"]


async def test_a_lost_device_loses_both_batches_and_gives_back_the_others(ahead: Ahead) -> None:
    def lost(_: MicroBatch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ahead.gpu.before_wait = lost
    ahead.comes(1, 2, 3)
    ahead.thread.start()
    with pytest.raises(BrokenDevice):
        await ahead.thread.ended

    assert ahead.gpu.events == ["launch 1", "launch 2", "wait 1"]
    assert [one.raw.entry_id for one in ahead.thread.release()[0]] == [b"3-0"]


async def test_no_batch_is_launched_without_a_place_for_its_results(ahead: Ahead) -> None:
    ahead.delivers = False
    ahead.comes(*range(1, 8))
    ahead.thread.start()
    await ahead.came(MOST_UNDELIVERED)

    launched = [event for event in ahead.gpu.events if event.startswith("launch")]
    assert len(launched) == MOST_UNDELIVERED


async def test_the_watchdog_follows_a_batch_that_was_launched(ahead: Ahead) -> None:
    limits: list[float | None] = []
    ahead.gpu.before_launch = lambda _: limits.append(ahead.watchdog._batch_limit_s)
    ahead.gpu.before_wait = lambda _: limits.append(ahead.watchdog._batch_limit_s)
    ahead.comes(1, 2)
    ahead.thread.start()
    await ahead.came(2)

    assert len(limits) == 4
    assert None not in limits
    assert ahead.watchdog._batch_limit_s is None


async def test_a_launch_beside_a_batch_may_take_as_long_as_both(ahead: Ahead) -> None:
    limits: list[float] = []
    ahead.pace.observe(90, 90, 100.0)  # so long that the least limit says nothing
    ahead.gpu.before_launch = lambda _: limits.append(ahead.watchdog._batch_limit_s or 0)
    ahead.comes(1, 2)
    ahead.thread.start()
    await ahead.came(2)

    assert limits[1] == pytest.approx(2 * limits[0])


async def test_bulk_is_not_launched_beside_a_batch_while_interactive_is_about(ahead: Ahead) -> None:
    ahead.thread.add(Lane.INTERACTIVE, [entry([90], number=0)])
    ahead.comes(2, 3)
    ahead.thread.start()
    await ahead.came(3)

    assert ahead.gpu.events == ["launch 1", "wait 1", "launch 2", "wait 2", "launch 3", "wait 3"]


async def test_more_than_a_batch_waits_for_a_device_that_is_given_two(ahead: Ahead) -> None:
    assert ahead.thread.wants == 150
    assert Bench().thread.wants == 100
