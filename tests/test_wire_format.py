"""`docs/wire-format.md` is enough to write a producer: its own bytes are a job, and get their vector."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.shared import jobs, results
from embedstream.shared.cards import ModelCard
from embedstream.shared.jobs import Job
from embedstream.shared.recipe import Pooling, Recipe

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "wire-format.md").read_text()


def worked_bytes(name: str) -> bytes:
    """The bytes of a worked example; the words behind them explain."""
    found = re.search(rf"```hex {name}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    lines = (re.match(r"(?:[0-9a-f]{2}\s{1,2})+", line + "  ") for line in found.group(1).splitlines())
    return bytes.fromhex("".join(line.group(0) for line in lines if line is not None))


def read_answer(data: bytes) -> NDArray[np.float32]:
    """A reader written from the page alone: the vectors of the first part, all of whose rows must be fine."""
    (size,) = struct.unpack_from("<I", data, 0)
    part = data[4 : 4 + size]
    assert part[:3] == b"ER\x01"
    n_rows, dim = struct.unpack_from("<II", part, 56)
    (n_messages,) = struct.unpack_from("<H", part, 76)
    assert n_messages == 0
    assert [part[80 + 12 * row] for row in range(n_rows)] == [0] * n_rows
    return np.frombuffer(part, "<f4", offset=80 + 12 * n_rows).reshape(-1, dim)


def test_the_worked_bytes_are_the_job_they_say() -> None:
    texts = ("Hello, world",)
    job = Job(bytes(range(16)), 0, 1, 0, 60_000, jobs.text_lengths(texts), texts=texts)
    assert (worked_bytes("header"), worked_bytes("body")) == job.encode()


@pytest.mark.parametrize(
    ("section", "size"), [("### Header, field `h`", jobs._HEADER.size), ("## A result", results._HEADER.size)]
)
def test_the_tables_follow_the_code(section: str, size: int) -> None:
    table = PAGE.split(section)[1].split("\n| 80 |")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", table, re.MULTILINE)
    at = 0
    for offset, width in rows:
        assert int(offset) == at
        at += int(width)
    assert at == size == 80


def test_every_field_of_a_cards_recipe_is_told() -> None:
    card = ModelCard("m", Recipe(8, (Pooling.MEAN,), normalize=True, dimension=4, vocab_size=100), "{}", "r")
    fields = json.loads(zlib.decompress(b"".join(card.encode())))["recipe"]
    table = PAGE.split("| field of `recipe` |")[1]
    named = [
        name for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(named) == sorted(fields)


@pytest.mark.integration
def test_the_worked_bytes_get_their_vector(serving: Any) -> None:
    from embedstream.shared.connections import connect_sync

    queue = connect_sync(serving.redis_url)
    stream = "ek:{all-MiniLM-L6-v2}:r:my-host-1"
    last: Any = queue.xadd(stream, {"p": ""})
    queue.pexpire(stream, 60_000)
    fields: dict[Any, Any] = {"h": worked_bytes("header"), "b": worked_bytes("body"), "rt": stream}
    queue.xadd("ek:{all-MiniLM-L6-v2}:q:i", fields)
    for _ in range(30):
        reply: Any = queue.xread({stream: last}, 8, 1000)
        if reply:
            break
    vectors = read_answer(reply[0][1][0][1][b"p"])
    queue.delete(stream)
    queue.close()
    np.testing.assert_allclose(vectors, serving.embed(["Hello, world"]), atol=1e-6)
