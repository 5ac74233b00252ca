"""Clients that misuse the connection: they hang up, dawdle, flood, or speak no HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import resource
from collections.abc import Iterator

import pytest

from .conftest import Site
from .peer import Peer, Reply, post, post_head

PROBE = b"GET /livez HTTP/1.1\r\nHost: t\r\n\r\n"
MANY = json.dumps({"input": [[row % 4000 + 16] * 20 for row in range(2048)]}).encode()
"""About 40,000 tokens in 32 jobs, 400 kB of floats."""


async def test_hanging_up_before_the_body(site: Site) -> None:
    async def attack() -> None:
        for sent in (b"", b"POST", post_head(1000), post_head(1000) + b'{"input": "'):
            for _ in range(20):
                peer = await site.dial()
                await peer.say(sent)
                peer.hang_up()

    await site.endures(attack)


async def test_hanging_up_while_waiting_calls_the_work_off(site: Site) -> None:
    async def attack() -> None:
        before = await site.metric('embedstream_requests_total{lane="interactive",outcome="abandoned"}')
        for _ in range(10):
            peer = await site.dial()
            await peer.say(post(MANY))
            started = await site.metric("embedstream_undelivered_bytes")
            peer.hang_up()
            assert started >= 0
        async with asyncio.timeout(20):
            while await site.metric("embedstream_undelivered_bytes") > 1000:  # the bystander's
                await asyncio.sleep(0.05)
        after = await site.metric('embedstream_requests_total{lane="interactive",outcome="abandoned"}')
        assert after > before

    await site.endures(attack)


@pytest.mark.parametrize("form", ["float", "bytes_only"])
async def test_hanging_up_within_the_answer(site: Site, form: str) -> None:
    body = json.dumps({**json.loads(MANY), "encoding_format": form}).encode()

    async def attack() -> None:
        peers = [await site.dial(buffer_bytes=4096) for _ in range(4)]
        for peer in peers:
            await peer.say(post(body))
        for peer in peers:
            assert (await peer.reader.readuntil(b"\r\n")).split()[1] == b"200"
            peer.hang_up()

    await site.endures(attack)


async def test_answers_that_nobody_takes(site: Site) -> None:
    """Without the limits on readers each of these would hold its answers for as long as it likes."""

    async def attack() -> None:
        peers = [await site.dial(buffer_bytes=4096) for _ in range(4)]
        for peer in peers:
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it reads, being a socket's
            await peer.say(post(MANY) * 6)
        async with asyncio.timeout(20):
            while (
                await site.metric("embedstream_http_connections") > 3
            ):  # the bystander, this question, and one closing
                await asyncio.sleep(0.1)
        for peer in peers:
            peer.hang_up()

    await site.endures(attack)


async def test_bodies_that_stop_or_drip(site: Site) -> None:
    async def stop() -> None:
        peer = await site.dial()
        reply = await peer.ask(post_head(1000) + b'{"input": ')
        assert (reply.status, reply.error["type"]) == (408, "RequestTimeoutError")
        assert await peer.rest() == b""

    async def drip() -> None:
        peer = await site.dial()
        await peer.say(post_head(100_000))
        answer = asyncio.create_task(peer.hear())
        while not answer.done():
            peer.writer.write(b" ")
            await asyncio.sleep(0.05)
        assert (await answer).status == 408

    async def attack() -> None:
        await asyncio.gather(*(stop() for _ in range(20)), *(drip() for _ in range(5)))

    await site.endures(attack)


async def test_half_closed_and_silent_connections_go_away(site: Site) -> None:
    async def attack() -> None:
        peers = [await site.dial() for _ in range(60)]
        for number, peer in enumerate(peers):
            if number % 3 == 1:
                peer.writer.write_eof()
            elif number % 3 == 2:
                await peer.say(b"GET /livez HTTP/1.1\r\nHo")
        ends = await asyncio.gather(*(peer.rest() for peer in peers))
        assert all(not end for end in ends[0::3] + ends[1::3])
        assert all(end.startswith(b"HTTP/1.1 408 ") for end in ends[2::3])

    await site.endures(attack)


FLOODS = {
    "one header": b"X: " + b"a" * 4_000_000,
    "many headers": b"a:b\r\n" * 800_000,
    "target": b"",
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_floods_of_headers(site: Site, kind: str) -> None:
    target = b"/" + (b"a" * 4_000_000 if kind == "target" else b"")

    async def flood() -> None:
        peer = await site.dial()
        reply = await peer.ask_while_sending(
            b"GET " + target + b" HTTP/1.1\r\nHost: t\r\n" + FLOODS[kind] + b"\r\n\r\n"
        )
        assert (reply.status, reply.error["type"]) == (431, "RequestHeaderFieldsTooLargeError")
        peer.hang_up()

    async def attack() -> None:
        await asyncio.gather(*(flood() for _ in range(5)))

    await site.endures(attack)


async def test_chunks_without_end(site: Site) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    tiny = head + b"1\r\n \r\n" * 300_000 + b"0\r\n\r\n"
    extension = head + b"1;" + b"a" * 3_000_000 + b"\r\n \r\n0\r\n\r\n"

    async def attack() -> None:
        for data in (tiny, extension):
            peer = await site.dial()
            assert (await peer.ask(data)).error["code"] == 400  # no JSON
            peer.hang_up()

    await site.endures(attack)


async def test_pipelining(site: Site) -> None:
    async def attack() -> None:
        peer = await site.dial()
        await peer.say((post(b'{"input": [[17, 401]]}') + PROBE) * 8)
        assert [(await peer.hear()).status for _ in range(16)] == [200] * 16
        await peer.say(PROBE * 20_000)
        replies: list[Reply] = []
        while not replies or replies[-1].status == 200:
            replies.append(await peer.hear())
        assert replies[-1].error["type"] == "ServiceUnavailableError"
        peer.hang_up()

    await site.endures(attack)


def _garbage(seed: int) -> Iterator[bytes]:
    chosen = random.Random(seed)
    for _ in range(100):
        yield chosen.randbytes(chosen.choice((1, 10, 100, 5000)))
    for _ in range(100):
        data = bytearray(post(b'{"input": "17 401"}'))
        for _ in range(chosen.randint(1, 8)):
            data[chosen.randrange(len(data))] = chosen.randrange(256)
        yield bytes(data)


async def test_garbage(site: Site) -> None:
    async def throw(data: bytes) -> None:
        peer = await site.dial()
        await peer.say(data)
        peer.writer.write_eof()  # what is cut short ends there
        end = await peer.rest()
        status = int(end.split()[1]) if end else 0
        # Some of it is legal still, and even a request that can be answered; but nothing may be a defect of ours.
        assert not end or (end.startswith(b"HTTP/1.1 ") and status < 500), (data, end)
        peer.hang_up()

    async def attack() -> None:
        data = list(_garbage(7))
        for first in range(0, len(data), 20):
            await asyncio.gather(*map(throw, data[first : first + 20]))

    await site.endures(attack)


async def _open(site: Site) -> Peer:
    peer = await site.dial()
    reply = await peer.ask(PROBE)
    assert reply.status == 200
    return peer


async def test_a_thousand_idle_connections(site: Site) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))

    async def attack() -> None:
        peers: list[Peer] = []
        for _ in range(20):
            peers += await asyncio.gather(*(_open(site) for _ in range(50)))
        assert await site.metric("embedstream_http_connections") >= 1000
        await site.works()
        assert {(await peer.ask(PROBE)).status for peer in peers[::50]} == {200}
        for peer in peers:
            peer.hang_up()
        while await site.metric("embedstream_http_connections") >= 100:  # a slow server still counts those of before
            await asyncio.sleep(0.05)

    await site.endures(attack)
