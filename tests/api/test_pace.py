"""Moments that a connection waits for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest
import uvloop

from embedstream.api.pace import Alarm

HELD_UP_S = 0.3


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("said", [b"a word", b""])
def test_a_loop_that_is_late_reads_before_it_loses_patience(
    new_loop: Callable[[], asyncio.AbstractEventLoop], said: bytes
) -> None:
    loop, seen = new_loop(), list[str]()
    reader, writer = os.pipe()
    other_reader, other_writer = os.pipe()

    def ring() -> None:
        seen.append("rung")
        loop.stop()

    alarm = Alarm(loop, ring)

    def read() -> None:
        os.read(reader, 10)
        seen.append("read")
        alarm.clear()
        loop.call_later(2 * HELD_UP_S, loop.stop)

    def hold_up() -> None:  # as what another connection has sent may do
        os.read(other_reader, 10)
        alarm.set(HELD_UP_S / 3)
        if said:
            os.write(writer, said)
        time.sleep(HELD_UP_S)

    loop.add_reader(reader, read)
    loop.add_reader(other_reader, hold_up)
    os.write(other_writer, b"a word")
    loop.call_later(20, loop.stop)
    try:
        loop.run_forever()
    finally:
        loop.remove_reader(reader)
        loop.remove_reader(other_reader)
        loop.close()
        for each in (reader, writer, other_reader, other_writer):
            os.close(each)
    assert seen == (["read"] if said else ["rung"])
