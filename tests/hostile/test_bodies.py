"""Bodies that are made to cost much: long, deep, wide, compressed, or of letters that are none."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from tests.chaos import toy

from .conftest import Site
from .peer import Reply, post

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MANY_BYTES = 50 * 1000 * 1000
LIMIT_BYTES = 64 * 1024 * 1024


def _json(value: object, **fields: object) -> bytes:
    return json.dumps({"input": value, **fields}, ensure_ascii=False).encode()


async def _all(site: Site, bodies: dict[str, bytes], *headers: bytes) -> dict[str, Reply]:
    """The answers, each on its own connection, some at a time."""
    replies = {}
    for name, body in bodies.items():
        peer = await site.dial()
        replies[name] = await peer.ask_while_sending(post(body, *headers))
        peer.hang_up()
    return replies


def _are_400(replies: dict[str, Reply]) -> None:
    for name, reply in replies.items():
        assert (reply.status, reply.error["type"] in {"Bad Request", "BadRequestError"}) == (400, True), (name, reply)
        assert len(reply.body) < 10_000, name


LONG = {
    "one text": lambda: _json("17 401 " * (MANY_BYTES // 7)),
    "one word": lambda: _json("a" * MANY_BYTES),
    "many texts": lambda: _json(["17 401 " * (MANY_BYTES // 7 // 2048)] * 2048),
    "token ids": lambda: _json([17] * (MANY_BYTES // 4)),
    "an unknown field": lambda: _json(17, more="a" * MANY_BYTES),
    "no end": lambda: b'{"input": "' + b"a" * MANY_BYTES,
}


@pytest.mark.parametrize("kind", LONG)
async def test_fifty_megabytes(site: Site, kind: str) -> None:
    body = LONG[kind]()

    async def attack() -> None:
        _are_400(await _all(site, {kind: body}))

    await site.endures(attack)


async def test_above_the_limit(site: Site) -> None:
    body = b" " * (LIMIT_BYTES + 1)

    async def attack() -> None:
        peer = await site.dial()
        reply = await peer.ask_while_sending(post(body))
        assert (reply.status, reply.error["type"]) == (413, "PayloadTooLargeError")
        chunk = b"%x\r\n%b\r\n" % (2**20, bytes(2**20))
        head = b"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        peer = await site.dial()
        assert (await peer.ask_while_sending(head + chunk * 65)).error["type"] == "PayloadTooLargeError"

    await site.endures(attack)


async def test_a_long_text_that_is_to_be_cut(site: Site) -> None:
    body = _json("17 401 " * 150_000, truncate_prompt_tokens=-1)
    right = toy.expected([[17, 401] * (512 // 2)])

    async def attack() -> None:
        peer = await site.dial()
        reply = await peer.ask(post(body))
        assert (reply.status, reply.headers["x-truncated-inputs"]) == (200, "1")
        assert np.array_equal(np.array([json.loads(reply.body)["data"][0]["embedding"]]), right)

    await site.endures(attack)


async def test_long_texts_that_are_to_be_cut_are_bounded(site: Site) -> None:
    body = _json("17 401 " * (MANY_BYTES // 7), truncate_prompt_tokens=-1)

    async def attack() -> None:
        peer = await site.dial()
        reply = await peer.ask_while_sending(post(body))
        assert reply.status in {200, 400}
        peer.hang_up()

    await site.endures(attack)


async def test_a_megabyte_in_one_text(site: Site) -> None:
    bodies = {word: _json(word * (1_000_000 // len(word.encode()))) for word in ("17 ", "a", "é", "👩‍👩‍👧 ", "\0")}

    async def attack() -> None:
        for name, reply in (await _all(site, bodies)).items():
            # A word of any length is one token: legal, where the vocabulary has one for what it does not know.
            assert (reply.status, len(reply.body) < 10_000) in {(400, True), (200, True)}, (name, reply)

    await site.endures(attack)


def _nested(depth: int, inner: bytes = b"") -> bytes:
    return b'{"input": ' + b"[" * depth + inner + b"]" * depth + b"}"


DEEP = {
    "lists": _nested(1_000_000),
    "a hundred lists": _nested(100, b"17"),
    "three lists": _nested(3, b"17"),
    "objects": b'{"input": ' + b'{"a":' * 500_000 + b"1" + b"}" * 500_000 + b"}",
    "lists without an end": b'{"input": ' + b"[" * 5_000_000,
    "lists in another field": b'{"input": "17 401", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"input": [' + b"1" * 1_000_000 + b"]}",
    "exponent": b'{"input": [1e999999999]}',
    "one key many times": b"{" + b'"input": "17 401", ' * 100_000 + b'"input": []}',
}


async def test_deep_and_odd_json(site: Site) -> None:
    async def attack() -> None:
        _are_400(await _all(site, DEEP))

    await site.endures(attack)


WIDE: dict[str, Callable[[], object]] = {
    "texts": lambda: ["17 401"] * 100_000,
    "empty texts": lambda: [""] * 100_000,
    "empty lists": lambda: [[]] * 100_000,
    "lists of a token": lambda: [[17]] * 100_000,
    "objects": lambda: [{"a": 1}] * 100_000,
    "nulls": lambda: [None] * 100_000,
    "fractions": lambda: [1.5] * 100_000,
    "texts and ids": lambda: ["a", 1] * 50_000,
    "ids above the vocabulary": lambda: [4096] * 500,
    "ids below it": lambda: [[-1, 17]],
    "lists of lists": lambda: [[[17]]] * 100_000,
    "token ids": lambda: [17] * 300_001,
}


async def test_wide_lists(site: Site) -> None:
    bodies = {name: _json(make()) for name, make in WIDE.items()}

    async def attack() -> None:
        _are_400(await _all(site, bodies))

    await site.endures(attack)


LETTERS = {
    "nul": (b'{"input": "17 \\u0000 401"}', 200),
    "emoji": (_json("👩‍👩‍👧‍👦 🏳️‍🌈 17"), 200),
    "combining marks": (_json("17 a" + "\u0301" * 100), 200),
    "both directions": (_json("\u202e17\u202c 401"), 200),
    "private and unassigned": (_json("\ue000 \U0010ffff 17"), 200),
    "a mark of byte order within": (_json("\ufeff17 401"), 200),
    "half a pair": (b'{"input": "17 \\ud800 401"}', 400),
    "the other half": (b'{"input": ["17", "\\udc00"]}', 400),
    "a pair in surrogates of utf-8": (b'{"input": "\xed\xa0\xbd\xed\xb8\x80"}', 400),
    "no utf-8": (b'{"input": "\xff\xfe"}', 400),
    "overlong": (b'{"input": "\xc0\x80"}', 400),
    "utf-16": ('{"input": "17"}'.encode("utf-16"), 400),
    "a raw line feed": (b'{"input": "17\n401"}', 400),
    "half a pair in a name": (b'{"input": "17 401", "model": "\\ud800"}', 400),
    "half a pair as a key": (b'{"input": "17 401", "\\ud800": 1}', 400),
}


async def test_letters(site: Site) -> None:
    async def attack() -> None:
        for name, reply in (await _all(site, {name: body for name, (body, _) in LETTERS.items()})).items():
            assert reply.status == LETTERS[name][1], (name, reply)
            if reply.status == 400:
                _are_400({name: reply})

    await site.endures(attack)


def _bomb(coding: str) -> bytes:
    """A body that would inflate to a gibibyte."""
    piece = bytes(2**24)
    if coding == "zstd":
        return zstd.compress(piece) * 64
    if coding == "gzip":
        return gzip.compress(piece) * 64
    packer = zlib.compressobj(9)
    first = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)) * 63


@pytest.mark.parametrize("coding", ["gzip", "zstd", "deflate"])
async def test_bombs(site: Site, coding: str) -> None:
    bomb = _bomb(coding)

    async def throw() -> None:
        peer = await site.dial()
        reply = await peer.ask_while_sending(post(bomb, b"Content-Encoding: %b" % coding.encode()))
        assert (reply.status, reply.error["type"]) == (413, "PayloadTooLargeError")
        peer.hang_up()

    async def attack() -> None:
        await asyncio.gather(*(throw() for _ in range(3)))

    await site.endures(attack)
