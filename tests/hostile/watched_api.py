"""An API process that writes down what each turn of its event loop costs: `python -m tests.hostile.watched_api …`.

The production loop is uvloop, whose handles cannot be watched; the callbacks are the same on asyncio's own. Processor
time of the thread is measured, so neither a busy machine nor a preemption counts; the collector of cycles is off, for a
pause of its own is no callback's fault.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn

from embedstream.api import main as api_main
from embedstream.api.__main__ import main

PATH_VARIABLE = "WATCHED_API_LINES"
LEAST_MS = 0.5
"""Shorter turns are not worth a line."""
_ROOT = str(Path(__file__).resolve().parents[2])


def watch(path: Path) -> None:
    """Write a line of JSON for each longer turn from now on: when it ended, its milliseconds, and what it was."""
    lines = path.open("a", buffering=1)
    run = asyncio.events.Handle._run

    def watched(self: asyncio.Handle) -> None:
        callback = self._callback  # type: ignore[attr-defined]  # a handle's own, and gone once it is cancelled
        before = _place(callback)
        start_ns = time.thread_time_ns()
        run(self)
        spent_ms = (time.thread_time_ns() - start_ns) / 1e6
        if spent_ms >= LEAST_MS:
            what = f"{_name(callback)} {before} -> {_place(callback)}"
            lines.write(json.dumps({"at_s": time.time(), "ms": round(spent_ms, 2), "what": what}) + "\n")

    asyncio.events.Handle._run = watched  # type: ignore[method-assign]  # that is the watch


def _task(callback: Any) -> asyncio.Task[Any] | None:
    task = getattr(callback, "__self__", None)
    return task if isinstance(task, asyncio.Task) else None


def _name(callback: Any) -> str:
    task = _task(callback)
    what = callback if task is None else task.get_coro()
    inner = what.func if isinstance(what, functools.partial) else what
    return str(getattr(inner, "__qualname__", repr(inner)))


def _place(callback: Any) -> str:
    """Where a task stands in our code: its innermost coroutine there."""
    task = _task(callback)
    place, step = "", task.get_coro() if task is not None else None
    while step is not None:
        frame = getattr(step, "cr_frame", None) or getattr(step, "ag_frame", None) or getattr(step, "gi_frame", None)
        if frame is not None and frame.f_code.co_filename.startswith(_ROOT) and ".venv" not in frame.f_code.co_filename:
            place = f"{frame.f_code.co_filename.removeprefix(_ROOT)[1:]}:{frame.f_lineno} {frame.f_code.co_name}"
        step = getattr(step, "cr_await", None) or getattr(step, "ag_await", None) or getattr(step, "gi_yieldfrom", None)
    return place


def _without_collector(serve: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(serve)
    async def served(*arguments: Any, **named: Any) -> None:
        gc.collect()
        gc.disable()
        await serve(*arguments, **named)

    return served


if __name__ == "__main__":
    watch(Path(os.environ.pop(PATH_VARIABLE)))
    api_main.uvicorn.Config = functools.partial(uvicorn.Config, loop="asyncio")  # type: ignore[attr-defined]  # as above
    uvicorn.Server.serve = _without_collector(uvicorn.Server.serve)  # type: ignore[method-assign,assignment]  # as above
    main()
