"""Forks: a child process embeds over connections of its own, and its parent goes on undisturbed."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from typing import Any

import pytest
from redis.asyncio import Redis

from embedstream.shared.keys import Keys
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

BEGIN = """
import asyncio, gc, itertools, os, sys, threading, traceback
import numpy as np
from embedstream.producer import Producer, SyncProducer
from embedstream.shared.settings import Settings

settings = Settings(redis_url=sys.argv[1], key_prefix=sys.argv[2])
LARGE = ["a b c d " * 1250] * 21  # more than 200,000 characters: they are tokenised in threads that do not fork


def check(producer, *numbers):
    assert (producer.embed([[number] for number in numbers])[:, 0] == np.array(numbers) + 1).all()


def check_large(producer):
    assert len(producer.embed(LARGE, long_inputs="truncate")) == len(LARGE)


def fork(work):
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def join(*children):
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


async def run(settings: Settings, prefix: str, script: str) -> None:
    """Run a script in a process of its own; it must end well and say nothing."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"),  # of forks, since Python 3.12
        *("-c", BEGIN + textwrap.dedent(script), str(settings.redis_url), prefix),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    try:
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, said.decode()) == (0, "")


async def no_reply_stream_is_left(redis: Redis, keys: Keys) -> None:
    assert [key async for key in redis.scan_iter(f"{keys.base}:r:*")] == []


async def test_a_child_opens_its_own(settings: Settings, prefix: str, stub: Any, redis: Redis, keys: Keys) -> None:
    script = """
    def work(number):
        def ask(number):
            check(producer, number)

        threads = [threading.Thread(target=ask, args=(number + step,)) for step in range(4)]
        for thread in threads:  # the first call of several threads at one time
            thread.start()
        for thread in threads:
            thread.join()
        assert len([thread for thread in threading.enumerate() if "embedstream" in thread.name]) == 1
        check_large(producer)
        producer.close()

    with SyncProducer(settings=settings) as producer:
        check(producer, 5)
        check_large(producer)
        children = [fork(lambda: work(number)) for number in (10, 20, 30)]
        for number in range(100):
            check(producer, number + 1)
        join(*children)
        check(producer, 6)
        check_large(producer)
    """
    await run(settings, prefix, script)
    await no_reply_stream_is_left(redis, keys)


async def test_a_parent_hears_its_answers_whatever_its_child_throws_away(
    settings: Settings, prefix: str, stub: Any, redis: Redis, keys: Keys
) -> None:
    script = """
    producer = SyncProducer(settings=settings)
    producer.open()
    check(producer, 5)

    async def collect():
        global producer
        del producer
        gc.collect()

    def work():
        asyncio.run(collect())  # connections are closed by the collector only while a loop runs

    join(fork(work))
    for number in range(100):
        check(producer, number + 1)
    producer.close()
    """
    await run(settings, prefix, script)
    await no_reply_stream_is_left(redis, keys)


async def test_what_was_begun_before_the_fork_goes_on_in_the_parent(
    settings: Settings, prefix: str, stub: Any, redis: Redis, keys: Keys
) -> None:
    script = """
    def work():
        for begun in (pairs, slices):
            try:
                for _ in begun:
                    pass
            except RuntimeError as error:
                assert "before this process was forked" in str(error), error
            else:
                raise AssertionError("it went on in the child")
        assert len(list(producer.map([[1], [2]]))) == 2  # and one that is begun here is all right
        producer.close()

    with SyncProducer(settings=settings) as producer:
        pairs = producer.map([[number % 900] for number in range(2000)])
        slices = producer.stream([[number % 900] for number in range(2000)])
        found, n_rows = [next(pairs)], len(next(slices).vectors)
        join(fork(work))
        found += list(pairs)
        assert [int(vector[0]) for _, vector in found] == [number % 900 + 1 for number in range(2000)]
        assert n_rows + sum(len(piece.vectors) for piece in slices) == 2000
    """
    await run(settings, prefix, script)
    await no_reply_stream_is_left(redis, keys)


async def test_a_child_that_ends_without_a_call_leaves_nothing(
    settings: Settings, prefix: str, stub: Any, redis: Redis, keys: Keys
) -> None:
    script = """
    with SyncProducer(settings=settings) as producer:
        check(producer, 5)
        if not (child := os.fork()):
            sys.exit(0)  # through the end of the `with` block, and of the interpreter
        join(child)
        check(producer, 6)
    """
    await run(settings, prefix, script)
    await no_reply_stream_is_left(redis, keys)


async def test_an_asynchronous_producer_says_what_to_do(
    settings: Settings, prefix: str, stub: Any, redis: Redis, keys: Keys
) -> None:
    script = """
    async def opened():
        producer = Producer(settings=settings)
        await producer.open()
        await check(producer)
        return producer

    async def check(producer):
        assert (await producer.embed([[5]]))[0, 0] == 6

    async def child():
        calls = (
            producer.embed([[5]]),
            producer.embed([]),
            producer.submit([[5]]),
            producer.result("00" * 16),
            producer.open(),
            anext(producer.stream([[5]])),
            anext(producer.map([[5]])),
        )
        for call in calls:
            try:
                await call
            except RuntimeError as error:
                assert "make a new one here" in str(error), error
            else:
                raise AssertionError("it was served")
        await producer.close()
        async with Producer(settings=settings) as own:
            await check(own)

    with asyncio.Runner() as runner:
        producer = runner.run(opened())
        join(fork(lambda: asyncio.run(child())))
        for _ in range(100):
            runner.run(check(producer))
        runner.run(producer.close())
    """
    await run(settings, prefix, script)
    await no_reply_stream_is_left(redis, keys)
