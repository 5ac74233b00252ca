"""Rules that take more than one request and its answer."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from embedstream.api.errors import row_of
from embedstream.shared.connections import connect_sync
from embedstream.shared.errors import StaleCard

from .case import EMBEDDINGS, covers
from .cases_request import LONG
from .client import Api, unpacked
from .described import Description
from .models import DIM, FAIL, SLOW
from .servers import BULK_KEY, FILE_KEY, KEY, SMALL_KEY, Servers
from .test_cases import CASES

pytestmark = pytest.mark.integration


def metric(api: Api, name: str) -> float:
    """The sum of a metric's samples."""
    lines = api.ask("GET", "/metrics").body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@covers("E-TRUNC-11")
def test_cut_inputs_are_counted(servers: Servers) -> None:
    api = servers["truncating"]
    before = metric(api, "embedstream_truncated_inputs_total")
    api.post({"input": [LONG, "a", LONG]})
    assert metric(api, "embedstream_truncated_inputs_total") == before + 2


@covers("E-NUM-10")
def test_casts_that_overflow_are_counted(servers: Servers) -> None:
    api = servers["raw"]
    before = metric(api, "embedstream_cast_overflows_total")
    api.post({"input": "the queue", "embed_dtype": "float16", "encoding_format": "bytes_only"})
    assert metric(api, "embedstream_cast_overflows_total") > before


@covers("E-RES-10")
def test_one_request_id_for_many_requests(servers: Servers) -> None:
    api = servers["tiny"]
    texts = [" ".join(letter * (1 + place % 5)) for place, letter in enumerate("abcdefghij" * 2)]
    expected = api.vectors(texts)

    def ask(text: str) -> Any:
        reply = api.post({"input": text, "request_id": "same"}, x_request_id="same")
        assert reply.json["id"] == "embd-same"
        return reply.vectors[0]

    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_allclose(list(pool.map(ask, texts)), expected, atol=1e-5)


@covers("E-LIM-04", "E-LIM-01", "E-NUM-04")
def test_the_most_inputs_in_every_form(servers: Servers) -> None:
    api = servers["tiny"]
    texts = [f"{number}" for number in range(2048)]
    expected = np.concatenate(
        [api.post({"input": texts[start : start + 256]}).vectors for start in range(0, 2048, 256)]
    )
    for form in ("float", "base64"):
        reply = api.post({"input": texts, "encoding_format": form})
        np.testing.assert_allclose(reply.vectors, expected, atol=1e-5)
        assert [item["index"] for item in reply.json["data"]] == list(range(2048))
    body = {"input": texts, "encoding_format": "bytes_only"}
    np.testing.assert_allclose(unpacked(api.post(body).body).reshape(2048, DIM), expected, atol=1e-5)
    omitted = api.post({**body, "encoding_format": "bytes"}, x_metadata="omit")
    np.testing.assert_allclose(unpacked(omitted.body).reshape(2048, DIM), expected, atol=1e-5)


@covers("E-NUM-09")
def test_a_failure_after_the_first_byte_cuts_the_connection(servers: Servers) -> None:
    """The failing input is in the last of many jobs, so the first have gone out by then, or none."""
    body = {"input": ["a"] * 1500 + [f"{SLOW} b"] * 100 + [f"{FAIL} {'the ' * 40}"], "encoding_format": "bytes_only"}
    content = json.dumps(body).encode()
    head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", servers["tiny"].port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
    headers, _, answer = data.partition(b"\r\n\r\n")
    if headers.startswith(b"HTTP/1.1 200"):
        lengths = [line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        assert [int(line.split(b":")[1]) for line in lengths] == [1601 * DIM * 4]
        assert len(answer) < 1601 * DIM * 4
    else:
        assert headers.startswith(b"HTTP/1.1 500")
        assert json.loads(answer)["error"]["code"] == 500


@covers("E-ERR-07", "E-ERR-09")
def test_a_full_lane(servers: Servers) -> None:
    """A lane of one byte takes a request when it is empty, and no second one."""
    api = servers["limited"]
    statuses: list[int] = []
    seen = threading.Event()

    def ask(number: int) -> None:
        reply = api.ask("POST", EMBEDDINGS, {"input": [f"{SLOW} {number}"] * 3})
        statuses.append(reply.status)
        if reply.status == 429:
            assert reply.error["type"] == "RateLimitError"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            assert "x-should-retry" not in reply.headers
            seen.set()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(16)))
    assert set(statuses) == {200, 429}
    assert seen.is_set()


def enqueued(servers: Servers, lane: str) -> int:
    """Jobs that the model's lane has ever had."""
    with closing(connect_sync(servers.redis_url)) as redis:
        info: Any = redis.xinfo_stream(f"tiny:{{tiny}}:q:{lane}")
    return int(info["entries-added"])


@covers("E-LANE-01", "E-LANE-03", "E-AUTH-08")
def test_where_requests_go(servers: Servers) -> None:
    api = servers["keyed"]

    def went(key: str, **headers: str) -> str:
        before = enqueued(servers, "i"), enqueued(servers, "b")
        api.post({"input": "a"}, authorization=f"Bearer {key}", **headers)
        after = enqueued(servers, "i"), enqueued(servers, "b")
        return {(1, 0): "interactive", (0, 1): "bulk"}[after[0] - before[0], after[1] - before[1]]

    assert went(FILE_KEY) == "interactive"
    assert went(FILE_KEY, x_lane="bulk") == "bulk"
    assert went(FILE_KEY, x_lane="interactive") == "interactive"
    assert went(BULK_KEY) == "bulk"
    assert went(BULK_KEY, x_lane="bulk") == "bulk"


@covers("E-LIM-03", "E-NUM-05", "E-ERR-03", "E-ORD-06")
def test_what_is_refused_queues_nothing(servers: Servers) -> None:
    """The promise of the contract's first lines, for all its cases at once."""
    api, refused = servers["tiny"], [case for case in CASES if case.server == "tiny" and case.status in (400, 404, 415)]
    assert len(refused) > 200
    before = enqueued(servers, "i") + enqueued(servers, "b")
    for case in refused:
        assert api.ask(case.method, case.path, case.body, case.headers, raw=case.raw).status == case.status
    assert enqueued(servers, "i") + enqueued(servers, "b") == before


@covers("E-AUTH-09", "E-ERR-09")
def test_a_quota_that_is_used_up(servers: Servers) -> None:
    api, headers = servers["keyed"], {"authorization": f"Bearer {SMALL_KEY}"}
    first = api.ask("POST", EMBEDDINGS, {"input": "the queue"}, headers)
    second = api.ask("POST", EMBEDDINGS, {"input": "the queue"}, headers)
    assert (first.status, second.status) == (200, 429)
    assert second.error["type"] == "RateLimitError"
    assert second.headers["retry-after"] == "120"
    assert "x-should-retry" not in second.headers
    description = Description(api.ask("GET", "/openapi.json", headers=headers).json)
    for reply in (first, second):
        description.check("POST", EMBEDDINGS, reply)
        assert reply.headers["x-ratelimit-limit-tokens"] == "4"
        assert reply.headers["x-ratelimit-remaining-tokens"] == "0"
        assert reply.headers["x-ratelimit-reset-tokens"]


@covers("E-HDR-09", "E-ERR-06")
def test_a_body_in_chunks(servers: Servers) -> None:
    def ask(*pieces: bytes) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", servers["limited"].port, timeout=60)) as connection:
            connection.request(
                "POST", EMBEDDINGS, iter(pieces), {"content-type": "application/json"}, encode_chunked=True
            )
            response = connection.getresponse()
            return response.status, response.read()

    assert ask(b'{"inp', b'ut": ', b'["a", ', b'"b"]}')[0] == 200
    status, body = ask(b'{"input": "', *[b"x" * 100] * 30, b'"}')
    assert status == 413
    assert json.loads(body)["error"]["type"] == "PayloadTooLargeError"


def exchanged(api: Api, *pieces: bytes) -> tuple[int, dict[str, Any], bytes]:
    """What comes back for bytes that are sent as they are, until the server ends the connection."""
    data = b""
    with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
        while received := connection.recv(1 << 16):
            data += received
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"], head.lower()


@covers("E-ERR-14", "E-ERR-15", "E-ERR-16", "E-ERR-01", "E-HDR-01")
@pytest.mark.parametrize(
    ("server", "sent", "status", "kind"),
    [
        ("tiny", b"nonsense\r\n\r\n", 400, "BadRequestError"),
        ("tiny", b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400, "BadRequestError"),
        (
            "tiny",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "BadRequestError",
        ),
        (
            "tiny",
            b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
            431,
            "RequestHeaderFieldsTooLargeError",
        ),
        ("impatient", b"GET / HTTP/1.1\r\nHost: x\r\n", 408, "RequestTimeoutError"),
        (
            "impatient",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
            408,
            "RequestTimeoutError",
        ),
    ],
    ids=["nonsense", "bad-header", "two-lengths", "large-head", "slow-head", "slow-body"],
)
def test_what_is_no_whole_request(servers: Servers, server: str, sent: bytes, status: int, kind: str) -> None:
    answered, error, head = exchanged(servers[server], sent)
    assert answered == status
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)
    assert b"\r\nx-request-id: " in head
    assert b"\r\ncontent-type: application/json" in head


@covers("E-ERR-17", "E-ERR-11")
def test_ids_of_another_revision() -> None:
    """How it comes about is tested with the producer, whose error this is."""
    row = row_of(StaleCard("made for another revision"))
    assert (row.status, row.type, row.permanent) == (409, "ConflictError", True)


@covers("E-DEAD-05")
def test_the_work_of_a_client_that_hangs_up_is_called_off(servers: Servers) -> None:
    api = servers["tiny"]
    name = 'embedstream_requests_total{lane="interactive",outcome="abandoned"}'
    texts = [f"{SLOW} {'a ' * 40}"] * 800  # ten batches, and half a second each
    before, content = metric(api, name), json.dumps({"input": texts}).encode()
    with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
        head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        deadline_s = time.monotonic() + 30
        while metric(api, "embedstream_undelivered_bytes") == 0:
            assert time.monotonic() < deadline_s
    while metric(api, name) < before + 1:
        assert time.monotonic() < deadline_s


@covers("E-DOC-01")
@pytest.mark.parametrize("server", ["tiny", "keyed", "open-metrics"])
def test_the_description_says_which_paths_need_a_key(servers: Servers, server: str) -> None:
    api = servers[server]
    document = api.ask("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json
    assert document["openapi"] == "3.1.0"
    for path, item in document["paths"].items():
        for method, operation in item.items():
            refused = api.ask(method.upper(), path).status == 401
            assert refused == ("security" in operation) == ("401" in operation["responses"]), (method, path)


@covers("E-DOC-02")
def test_the_page_loads_nothing_from_elsewhere(servers: Servers) -> None:
    reply = servers["tiny"].ask("GET", "/docs")
    assert reply.status == 200
    page = reply.body.decode()
    assert "/v1/embeddings" in page
    assert not re.findall(r"<(?:script|link|img|iframe)\b|@import|url\(|(?:src|href)=[\"']?(?:https?:)?//", page)
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
