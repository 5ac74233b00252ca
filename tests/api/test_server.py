"""One connection against its limits, over real sockets; the application behind it is the whole one."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from tests.api.conftest import StubProducer
from tests.hostile.peer import PATIENCE_S, Peer

from embedstream.api import create_app
from embedstream.api.server import PROBE_CONNECTIONS, Connection, bound_to
from embedstream.shared.settings import Settings

BODY = json.dumps({"input": "a b"}).encode()
ASK = b"POST /v1/embeddings HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)
CHUNKED = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)
PROBE = b"GET /livez HTTP/1.1\r\nHost: t\r\n\r\n"


@dataclass
class Site:
    port: int
    server: uvicorn.Server
    peers: list[Peer] = field(default_factory=list)

    async def dial(self, *, buffer_bytes: int = 0) -> Peer:
        peer = await Peer.dial(self.port, buffer_bytes=buffer_bytes)
        self.peers.append(peer)
        return peer

    @property
    def connections(self) -> list[Connection]:
        return [each for each in self.server.server_state.connections if isinstance(each, Connection)]

    async def until(self, count: int) -> None:
        """Wait until the server has so many connections."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.connections) != count:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def site(app: Any, **limits: Any) -> AsyncIterator[Site]:
    """A server of this application in this loop, on a port of its own."""
    settings = Settings(**limits)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    config = uvicorn.Config(
        app,
        http=bound_to(settings),
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))  # `serve` would take the test's signals
    here = Site(listener.getsockname()[1], server)
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        yield here
    finally:
        for peer in here.peers:
            peer.hang_up()
        server.should_exit = True
        await task


@asynccontextmanager
async def whole(producer: StubProducer, **limits: Any) -> AsyncIterator[Site]:
    async with site(create_app(Settings(**limits), producer), **limits) as here:
        yield here


async def test_a_usual_request_and_the_next_on_the_same_connection(producer: StubProducer) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        for _ in range(2):
            reply = await peer.ask(ASK)
            assert (reply.status, len(json.loads(reply.body)["data"])) == (200, 1)


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
NO_HTTP = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01",
    "http 0.9": b"GET /\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: t\n\n",
    "nul in a header": b"GET / HTTP/1.1\r\nHost: t\0\r\n\r\n",
    "space before a colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "folded header": HEAD + b"X-Fold: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde",
    "list of lengths": HEAD + b"Content-Length: 5, 5\r\n\r\nabcde",
    "length with a sign": HEAD + b"Content-Length: +5\r\n\r\nabcde",
    "length beyond measure": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nabcde",
    "coding before chunks": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding after chunks": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "unknown coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks in http 1.0": b"POST /v1/embeddings HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size of letters": CHUNKED + b"zz\r\n",
    "chunk size with a sign": CHUNKED + b"-1\r\n",
    "chunk size in C": CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
    "chunk size beyond measure": CHUNKED + b"fffffffffffffffff\r\n",
    "chunk longer than it says": CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
    "line feed after a chunk": CHUNKED + b"1\na\r\n0\r\n\r\n",
    "length behind chunks": CHUNKED + b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n",
    "target without a path": b"GET t:80 HTTP/1.1\r\nHost: t\r\n\r\n",
    "tunnel": b"CONNECT t:80 HTTP/1.1\r\nHost: t\r\n\r\n",
}


async def test_what_is_no_request_is_a_400_and_the_end(producer: StubProducer) -> None:
    async with whole(producer) as here:
        for name, data in NO_HTTP.items():
            peer = await here.dial()
            reply = await peer.ask(data)
            told = (reply.status, reply.error["type"], reply.headers["connection"])
            assert told == (400, "BadRequestError", "close"), name
            assert await peer.rest() == b"", name
        assert (await (await here.dial()).ask(ASK)).status == 200
    assert len(producer.runs) == 1


async def test_requests_behind_broken_ones_are_never_run(producer: StubProducer) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        reply = await peer.ask(CHUNKED + b"zz\r\n" + ASK)
        assert reply.status == 400
        assert await peer.rest() == b""
    assert producer.runs == []


async def test_an_answer_under_way_is_whole_before_the_next_request_is_refused(producer: StubProducer) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        await peer.say(ASK + ASK + b"NO HTTP\r\n\r\n")
        assert [(await peer.hear()).status for _ in range(3)] == [200, 200, 400]
        assert await peer.rest() == b""


async def test_fields_behind_the_chunks_are_no_headers(producer: StubProducer) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        body = b"%x\r\n%b\r\n0\r\nX-Request-Id: smuggled\r\n\r\n" % (len(BODY), BODY)
        await peer.say(ASK + CHUNKED + body)  # the second is read whole before it begins
        assert (await peer.hear()).status == 200
        reply = await peer.hear()
        assert (reply.status, reply.headers["x-request-id"] != "smuggled") == (200, True)


@pytest.mark.parametrize("asked", ["h2c", "websocket"])
async def test_who_would_rather_speak_another_protocol_is_answered_in_this(producer: StubProducer, asked: str) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        upgrade = b"Host: t\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n" % asked.encode()
        await peer.say(ASK.replace(b"Host: t\r\n", upgrade) + ASK)
        assert [(await peer.hear()).status for _ in range(2)] == [200, 200]


ENDLESS: dict[str, Callable[[int], bytes]] = {
    "one long header": lambda size: b"X: " + b"a" * size,
    "many short headers": lambda size: b"a:b\r\n" * (size // 5),
    "a long target": lambda size: b"X: a\r\n",
}


@pytest.mark.parametrize("parts", [1, 40])
@pytest.mark.parametrize("kind", ENDLESS)
async def test_a_head_above_the_limit_is_a_431(producer: StubProducer, kind: str, parts: int) -> None:
    target = b"/livez?" + (b"a" * 60_000 if kind == "a long target" else b"")
    data = b"GET " + target + b" HTTP/1.1\r\nHost: t\r\n" + ENDLESS[kind](60_000) + b"\r\n\r\n"
    async with whole(producer, header_limit_bytes=20_000) as here:
        peer = await here.dial()
        step = -(-len(data) // parts)
        for first in range(0, len(data), step):
            await peer.say(data[first : first + step])
            await asyncio.sleep(0)
        reply = await peer.hear()
        assert (reply.status, reply.error["type"]) == (431, "RequestHeaderFieldsTooLargeError")
        assert "20000 bytes (--header-limit-bytes" in reply.error["message"]
        assert await peer.rest() == b""


async def test_a_header_without_an_end_is_a_431(producer: StubProducer) -> None:
    async with whole(producer, header_limit_bytes=20_000) as here:
        peer = await here.dial()
        await peer.say(b"GET /livez HTTP/1.1\r\nX: " + b"a" * 30_000)
        await asyncio.sleep(0.05)
        assert (await peer.ask(b"a" * 30_000)).status == 431


async def test_a_small_limit_holds_for_a_head_that_comes_at_once(producer: StubProducer) -> None:
    async with whole(producer, header_limit_bytes=1024) as here:
        peer = await here.dial()
        assert (await peer.ask(PROBE.replace(b"Host: t", b"Host: t\r\nX: " + b"a" * 1024))).status == 431


async def test_a_head_below_the_limit_is_read(producer: StubProducer) -> None:
    async with whole(producer, header_limit_bytes=20_000) as here:
        peer = await here.dial()
        reply = await peer.ask(PROBE.replace(b"Host: t", b"Host: t\r\nX: " + b"a" * 19_000))
        assert reply.status == 200


@pytest.mark.parametrize("beginning", [b"", b"\r\n\r\n"])
async def test_a_connection_that_never_asks_ends_without_a_word(producer: StubProducer, beginning: bytes) -> None:
    async with whole(producer, header_timeout_s=0.2) as here:
        peer = await here.dial()
        await peer.say(beginning)
        assert await peer.rest() == b""


async def test_empty_lines_keep_no_connection_open_after_an_answer(producer: StubProducer) -> None:
    async with whole(producer, header_timeout_s=0.2) as here:
        peer = await here.dial()
        assert (await peer.ask(PROBE)).status == 200
        await peer.say(b"\r\n")
        assert await peer.rest() == b""


async def test_a_head_that_does_not_end_is_a_408(producer: StubProducer) -> None:
    async with whole(producer, header_timeout_s=0.3) as here:
        peer = await here.dial()
        assert (await peer.ask(PROBE)).status == 200
        reply = await peer.ask(b"GET /livez HTTP/1.1\r\nHost:")
        assert (reply.status, reply.error["type"], reply.headers["connection"]) == (408, "RequestTimeoutError", "close")
        assert "0.3 s (--header-timeout-s)" in reply.error["message"]
        assert await peer.rest() == b""


async def test_an_idle_connection_ends_after_the_keep_alive(producer: StubProducer) -> None:
    async with whole(producer, keep_alive_timeout_s=1, header_timeout_s=0.2) as here:
        peer = await here.dial()
        assert (await peer.ask(PROBE)).status == 200
        await asyncio.sleep(0.5)  # longer than a head may take: none has begun
        assert (await peer.ask(PROBE)).status == 200
        assert await peer.rest() == b""


@pytest.mark.parametrize("head", [ASK[: -len(BODY)], CHUNKED])
async def test_a_body_that_stops_is_a_408(producer: StubProducer, head: bytes) -> None:
    async with whole(producer, read_timeout_s=0.3) as here:
        peer = await here.dial()
        reply = await peer.ask(head)
        assert (reply.status, reply.error["type"], reply.headers["connection"]) == (408, "RequestTimeoutError", "close")
        assert "0.3 s (--read-timeout-s)" in reply.error["message"]
        assert await peer.rest() == b""
    assert producer.runs == []


async def _drip(peer: Peer) -> None:
    while True:
        await peer.say(b"1\r\n \r\n")
        await asyncio.sleep(0.02)


async def test_a_body_that_drips_is_a_408(producer: StubProducer) -> None:
    async with whole(producer, read_timeout_s=0.4) as here:
        peer = await here.dial()
        await peer.say(CHUNKED)
        drip = asyncio.create_task(_drip(peer))
        reply = await peer.hear()
        drip.cancel()
        await asyncio.wait([drip])
        assert (reply.status, reply.error["type"]) == (408, "RequestTimeoutError")
        assert "(--min-rate-bytes-per-s)" in reply.error["message"]


async def test_a_body_that_drips_may_without_a_least_rate(producer: StubProducer) -> None:
    async with whole(producer, read_timeout_s=0.4, min_rate_bytes_per_s=0) as here:
        peer = await here.dial()
        await peer.say(CHUNKED)
        drip = asyncio.create_task(_drip(peer))
        await asyncio.sleep(1)
        drip.cancel()
        await asyncio.wait([drip])
        reply = await peer.ask(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert reply.status == 200


async def test_a_body_the_application_does_not_read_yet_is_not_slow() -> None:
    release = asyncio.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await release.wait()
        size, more = 0, True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            size, more = size + len(message["body"]), message["more_body"]
        text = b"%d" % size
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
        await send({"type": "http.response.body", "body": text})

    async with site(late, read_timeout_s=0.3, min_rate_bytes_per_s=1_000_000_000) as here:
        peer = await here.dial()
        size = 300_000
        asking = asyncio.create_task(peer.ask(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (size, bytes(size))))
        await asyncio.sleep(1.0)
        release.set()
        reply = await asking
        assert (reply.status, reply.body) == (200, b"300000")


async def test_chunks_of_a_byte_are_read_in_slices(producer: StubProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = Connection._feed

    def note(self: Connection, data: bytes) -> None:
        fed.append(len(data))
        feed(self, data)

    monkeypatch.setattr(Connection, "_feed", note)
    async with whole(producer) as here:
        peer = await here.dial()
        text = BODY + b" " * 60_000
        reply = await peer.ask(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n" + PROBE)
        assert (reply.status, (await peer.hear()).status) == (200, 200)
    assert max(fed) <= 16 * 1024
    assert sorted(fed)[len(fed) // 2] <= 4096


async def test_a_long_body_comes_whole(producer: StubProducer) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        body = BODY + b" " * 3_000_000
        for _ in range(2):
            reply = await peer.ask(b"%bContent-Length: %d\r\n\r\n%b" % (HEAD, len(body), body))
            assert reply.status == 200
        await peer.say(b"%bContent-Length: %d\r\n\r\n%b%b" % (HEAD, len(body), body, PROBE))
        assert [(await peer.hear()).status for _ in range(2)] == [200, 200]


async def test_a_body_above_the_limit_is_told_before_it_is_sent(producer: StubProducer) -> None:
    async with whole(producer, payload_limit=10_000) as here:
        peer = await here.dial()
        size = 3_000_000
        reply = await peer.ask(
            b"%bContent-Length: %d\r\n\r\n%b" % (HEAD, size, b" " * size)
        )  # sends all before it reads
        assert (reply.status, reply.error["type"]) == (413, "PayloadTooLargeError")
        assert (await peer.ask(ASK)).status == 200  # and the connection still serves


async def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(
    producer: StubProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedstream.api.server._DISCARD_S", 0.5)
    monkeypatch.setattr("embedstream.api.server._LINGER_S", 0.5)
    async with whole(producer, payload_limit=10_000, min_rate_bytes_per_s=0) as here:
        peer = await here.dial()
        await peer.say(CHUNKED + b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        drip = asyncio.create_task(_drip(peer))
        assert (await peer.hear()).status == 413
        assert await peer.rest() == b""
        await asyncio.wait([drip])


async def test_too_many_requests_on_one_connection_are_refused(producer: StubProducer) -> None:
    async with whole(producer) as here:
        peer = await here.dial()
        await peer.say(PROBE * 2000)
        replies = []
        while (reply := await peer.hear()).status == 200:
            replies.append(reply)
        assert (reply.status, reply.error["type"]) == (503, "ServiceUnavailableError")
        assert 32 <= len(replies) <= 34
        assert await peer.rest() == b""


async def test_beyond_the_limit_only_probes_are_answered(producer: StubProducer) -> None:
    async with whole(producer, max_connections=2) as here:
        first, second = [await here.dial() for _ in range(2)]
        for peer in (first, second):
            assert (await peer.ask(PROBE)).status == 200
        third = await here.dial()
        reply = await third.ask(ASK)
        assert (reply.status, reply.error["type"], reply.headers["connection"]) == (
            503,
            "ServiceUnavailableError",
            "close",
        )
        assert "limit of 2 (--max-connections)" in reply.error["message"]
        assert int(reply.headers["retry-after"]) >= 1
        fourth = await here.dial()
        probe = await fourth.ask(PROBE.replace(b"/livez", b"/health?x"))
        assert (probe.status, probe.headers["connection"]) == (200, "close")
        for peer in (third, fourth):
            assert await peer.rest() == b""
            peer.writer.close()
        assert (await first.ask(ASK)).status == 200
        first.writer.close()
        await here.until(1)
        assert (await (await here.dial()).ask(ASK)).status == 200


async def test_far_beyond_the_limit_all_are_refused_at_once(producer: StubProducer) -> None:
    async with whole(producer, max_connections=1) as here:
        await asyncio.gather(*(here.dial() for _ in range(1 + PROBE_CONNECTIONS)))
        await here.until(1 + PROBE_CONNECTIONS)
        last = await here.dial()
        reply = await last.hear()  # before it has said anything
        assert (reply.status, reply.error["type"]) == (503, "ServiceUnavailableError")
        assert await last.rest() == b""


def _torrent(size: int) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    return app


async def test_who_does_not_take_the_answer_is_cut_off() -> None:
    async with site(_torrent(40_000_000), write_timeout_s=0.3) as here:
        peer = await here.dial(buffer_bytes=4096)
        await peer.say(b"GET / HTTP/1.1\r\n\r\n")
        await here.until(1)
        await here.until(0)
        taken = await peer.rest()
        assert len(taken) < 40_000_000


async def test_who_takes_the_answer_slowly_gets_it_all() -> None:
    size = 6_000_000
    async with site(_torrent(size), write_timeout_s=0.4, min_rate_bytes_per_s=1000) as here:
        peer = await here.dial(buffer_bytes=4096)
        await peer.say(b"GET / HTTP/1.1\r\n\r\n")
        got = 0
        async with asyncio.timeout(PATIENCE_S):
            await peer.reader.readuntil(b"\r\n\r\n")
            while got < size:
                got += len(await peer.reader.read(200_000))
                await asyncio.sleep(0.03)
        assert got == size


async def test_all_requests_of_a_connection_hear_of_its_end(producer: StubProducer) -> None:
    began, told = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        assert (await receive())["type"] == "http.request"
        began.set()
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with site(app) as here:
        peer = await here.dial()
        await peer.say(PROBE + PROBE)
        await began.wait()
        peer.writer.transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            await told.wait()
