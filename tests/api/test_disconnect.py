"""Clients that hang up: their requests are given up at once, and nothing of them is left."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.api.disconnect import unless_hung_up
from embedstream.producer import Embeddings, Options, Prepared, Producer
from embedstream.producer.request import Inputs
from embedstream.shared.keys import Keys
from embedstream.shared.settings import Settings


class Client:
    """One request over ASGI, whose connection the test can cut."""

    def __init__(self, body: dict[str, Any], **headers: str) -> None:
        self.hung_up = asyncio.Event()
        self.status: int | None = None
        self._body: bytes | None = orjson.dumps(body)
        given = [(b"content-type", b"application/json")]
        given += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "raw_path": b"/v1/embeddings",
            "query_string": b"",
            "headers": given,
            "client": None,
            "server": None,
            "scheme": "http",
            "http_version": "1.1",
        }

    async def receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]

    async def call(self, app: Starlette) -> int | None:
        await app(self.scope, self.receive, self.send)
        return self.status


def never() -> Receive:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    return receive


async def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> int:
        return 7

    before = len(asyncio.all_tasks())
    assert await unless_hung_up(never(), work()) == 7
    assert len(asyncio.all_tasks()) == before


async def test_errors_of_the_work_are_the_callers() -> None:
    async def work() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await unless_hung_up(never(), work())


async def test_a_hang_up_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    before = len(asyncio.all_tasks())
    with pytest.raises(ClientDisconnect):
        await unless_hung_up(receive, work())
    assert ended.is_set()
    assert len(asyncio.all_tasks()) == before


async def test_a_cancelled_request_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(unless_hung_up(never(), work()))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert ended.is_set()


async def test_the_log_has_the_status_of_a_hang_up(app: Starlette, producer: StubProducer) -> None:
    async def run(prepared: Prepared) -> Embeddings:
        await asyncio.Event().wait()
        raise AssertionError(prepared)

    producer.run = run  # type: ignore[method-assign] # a request nobody answers
    client = Client({"input": "a"})
    with structlog.testing.capture_logs() as logs:
        calling = asyncio.create_task(client.call(app))
        await asyncio.sleep(0.01)
        assert not calling.done()
        client.hung_up.set()
        await calling
    assert [(entry["status"], entry["error"]) for entry in logs] == [(499, "ClientDisconnect")]


async def test_who_leaves_keeps_no_place_among_large_texts(app: Starlette, producer: StubProducer) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def prepare(inputs: Inputs, options: Options) -> Prepared:
        begun.set()
        try:
            await asyncio.Event().wait()  # for its turn to be tokenised
        finally:
            ended.set()
        raise AssertionError(inputs, options)

    producer.prepare = prepare  # type: ignore[method-assign] # a turn that never comes
    client = Client({"input": ["a " * 60_000, "b " * 60_000], "truncate_prompt_tokens": -1})
    calling = asyncio.create_task(client.call(app))
    await asyncio.wait_for(begun.wait(), 30)
    assert not calling.done()
    client.hung_up.set()
    assert await asyncio.wait_for(calling, 30) == 499
    assert ended.is_set()


async def connections_made(producer: Producer) -> int:
    stats: Any = await producer._redis.info("stats")
    return int(stats["total_connections_received"])


@pytest.mark.integration
async def test_thousands_of_hang_ups_leave_nothing(redis_url: str) -> None:
    """With a queue that nobody serves: only the callers' leaving ends these requests."""
    settings = Settings(redis_url=redis_url, key_prefix="hangup", scale_from_zero_s=60, served_model_name=("m",))
    keys = Keys("hangup", "m")
    async with Producer(settings=settings, model="m") as producer:
        app = create_app(settings, producer)
        tasks = connections = 0
        for number in range(20):
            clients = [Client({"input": f"text {number}"}) for _ in range(100)]
            calls = [asyncio.create_task(client.call(app)) for client in clients]
            for client in clients[::2]:
                client.hung_up.set()  # some before they are queued
            while not all(call.done() for call in calls[::2]) or len(list(producer._sessions.requests())) < 50:
                await asyncio.sleep(0.01)
            for client in clients:
                client.hung_up.set()
            assert {await call for call in calls} == {499}
            assert list(producer._sessions.requests()) == []
            if number == 4:
                tasks = len(asyncio.all_tasks())
                connections = await connections_made(producer)
        assert len(asyncio.all_tasks()) <= tasks + 2  # the fleet's polling may have one of its own
        assert await connections_made(producer) - connections < 5  # the pool may grow; a broken command costs one each
        redis = producer._redis
        async with asyncio.timeout(20):
            while not await redis.exists(keys.notices):
                await asyncio.sleep(0.01)
        await redis.delete(*[key async for key in redis.scan_iter("hangup:*")])
