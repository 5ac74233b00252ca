from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from embedstream.producer.loop_thread import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


async def fail() -> int:
    raise ValueError("no such number")


def test_results_and_errors_come_back(thread: LoopThread) -> None:
    assert thread.call(asyncio.sleep(0, 7)) == 7
    with pytest.raises(ValueError, match="no such number"):
        thread.call(fail())


@pytest.mark.parametrize("swallowed", [0, 1, 2])
def test_what_swallows_its_cancellation_ends_all_the_same(
    thread: LoopThread, swallowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `asyncio.wait_for` may: a caller who was interrupted would wait for its end for ever."""
    monkeypatch.setattr("embedstream.producer.loop_thread._AGAIN_S", 0.01)
    begun, ended = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        for _ in range(swallowed):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    def interrupted(_: Future[Any]) -> None:
        assert begun.wait(20)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            thread.call(work())
    assert ended.wait(20)


def test_what_comes_too_late_is_never_begun() -> None:
    thread = LoopThread()
    thread.stop()
    with pytest.raises(RuntimeError, match="closed"):
        thread.call(fail())  # which warns if it is neither awaited nor closed
