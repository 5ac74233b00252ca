"""Errors, headers, keys, deadlines, lanes, limits and partial results."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import zstandard

from .case import EMBEDDINGS, Case, Check, bad, misfit, ok
from .cases_request import LONG, TEXT, a, id_is, plain, unit
from .models import FAIL, NOT_FINITE, SLOW
from .servers import BULK_KEY, KEY, ORIGIN, OTHER_KEY, Api, Reply

_OPEN = ("/health", "/livez", "/ready", "/ping", "/version")
_SHUT = ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/docs", "/nowhere", "/v1/nowhere")
_SHUT_POSTS = (EMBEDDINGS, "/pooling", "/tokenize", "/detokenize")
_PARTIAL = {"x-on-error": "partial"}
_BEARER = {"authorization": f"Bearer {KEY}"}


def failing(*items: tuple[int, int, str] | None, tokens: int | None = None) -> Check:
    """The items of `data`: None for a vector, or (status, index, words) for an error."""

    def check(reply: Reply, api: Api) -> None:
        data = reply.json["data"]
        assert [item["index"] for item in data] == list(range(len(items)))
        for item, expected in zip(data, items, strict=True):
            if expected is None:
                assert item["object"] == "embedding"
                assert set(item) == {"index", "object", "embedding"}
            else:
                status, index, words = expected
                assert set(item) == {"index", "object", "error"}
                assert item["object"] == "error"
                assert item["index"] == index
                assert set(item["error"]) == {"message", "type", "param", "code"}
                assert item["error"]["code"] == status
                assert words in item["error"]["message"]
        assert tokens is None or reply.tokens == tokens

    return check


def rest_is(place: int, text: str) -> Check:
    """The vector at a place is that of a text."""

    def check(reply: Reply, api: Api) -> None:
        embedding = reply.json["data"][place]["embedding"]
        np.testing.assert_allclose([embedding], api.vectors(text), atol=1e-5)

    return check


def short_message(reply: Reply, api: Api) -> None:
    """Of a body with huge values the message shows little."""
    assert len(reply.error["message"]) < 6000
    assert "y" * 300 not in reply.error["message"]


def packed_json(body: Any, how: Any) -> bytes:
    """A compressed body."""
    return bytes(how(json.dumps(body).encode()))


def _partial(rows: str, name: str, inputs: Any, check: Check, **fields: Any) -> Case:
    return ok(rows, name, {"input": inputs, **fields}, check, headers=_PARTIAL)


CASES: list[Case] = [
    # Their shape
    misfit("E-ERR-02", "one wrong field", a(dimensions="x"), "body.dimensions", r"^\d+ validation errors?:\n  \{"),
    misfit("E-ERR-02", "the first of several wrong fields", a(encoding_format="x", user=5), message="encoding_format"),
    misfit("E-ERR-02 E-ERR-12", "a huge word", a(encoding_format="y" * 10_000), check=short_message),
    misfit("E-ERR-02 E-ERR-12", "a huge mixed list", {"input": ["y" * 10_000, 1]}, "body.input", check=short_message),
    misfit(
        "E-ERR-02",
        "many wrong fields",
        {"input": 5, **dict.fromkeys(("user", "request_id", "model"), 1)},
        check=short_message,
    ),
    bad("E-ERR-03 E-ERR-11", "a size", a(dimensions=5), r"got 5", "dimensions"),
    Case(
        "E-ERR-12",
        "a text that is too long",
        {"input": "the secret " * 99},
        status=400,
        check=lambda r, _: _lacks(r, "secret"),
    ),
    *(
        Case("E-ERR-04 E-ERR-01 E-HDR-01", f"{method} {path}", None, method, path, status=404, type="NotFoundError")
        for method, path in (
            *(("GET", "/"), ("GET", "/v1"), ("POST", "/v1/embedding"), ("GET", "/v1/embeddings/x"), ("GET", "/%00")),
            *(("GET", "/v1/embeddings/"), ("POST", "/v1//embeddings"), ("GET", "/.env"), ("DELETE", "/x")),
        )
    ),
    *(
        Case(
            "E-ERR-05 E-ERR-01",
            f"{method} {path}",
            None,
            method,
            path,
            status=405,
            answers={"allow": allow},
        )
        for method, path, allow in (
            *(("GET", EMBEDDINGS, "POST"), ("PUT", EMBEDDINGS, "POST"), ("DELETE", EMBEDDINGS, "POST")),
            *(("POST", "/v1/models", "(?=.*GET).*"), ("POST", "/health", "(?=.*GET).*"), ("GET", "/tokenize", "POST")),
            *(("GET", "/detokenize", "POST"), ("GET", "/pooling", "POST"), ("PATCH", EMBEDDINGS, "POST")),
        )
    ),
    Case("E-ERR-06", "a large body", {"input": "a" * 3000}, server="limited", status=413, message="2048"),
    Case("E-ERR-06", "a large body of blanks", b" " * 2049, server="limited", status=413, message="2048"),
    ok("E-ERR-06", "a body of the limit", b'{"input": "a"}' + b" " * (2048 - 14), server="limited"),
    *(
        Case("E-ERR-08 E-ERR-09", f"no consumer, {name}", body, server="deserted", status=503)
        for name, body in {"a text": a(), "ids": {"input": [5]}, "bytes": a(encoding_format="bytes")}.items()
    ),
    Case("E-ERR-08 E-ERR-09", "no Redis", a(), server="no-redis", status=503),
    misfit("E-ERR-08", "no consumer, but malformed", {"input": 5}, server="deserted"),
    Case("E-ERR-10 E-ERR-11", "fails in the model", {"input": FAIL}, status=500),
    Case("E-ERR-10", "one of three fails in the model", {"input": ["a", FAIL, "b"]}, status=500),
    bad("E-ERR-13 E-LIM-02", "names limit and value", {"input": ["a"] * 2049}, r"(?s)(?=.*2048)(?=.*2049)"),
    # Headers
    *(
        ok(
            "E-HDR-01",
            f"request id {given[:9]}",
            a(),
            headers={"X-Request-Id": given},
            answers={"x-request-id": expected},
        )
        for given, expected in (("abc", "abc"), ("~!{}", r"~!\{\}"), ("x" * 128, "x{128}"))
    ),
    *(
        ok(
            "E-HDR-02",
            f"request id {given[:9]!r}",
            a(),
            headers={"X-Request-Id": given},
            answers={"x-request-id": "[0-9a-f]{16}"},
        )
        for given in ("", "x" * 129, "a b", "\u00e9", "a\tb")
    ),
    Case("E-HDR-01", "on an error", b"{", headers={"X-Request-Id": "e1"}, status=400, answers={"x-request-id": "e1"}),
    ok("E-HDR-01", "made here", a(), answers={"x-request-id": "[0-9a-f]{16}"}),
    *(
        ok("E-HDR-08", f"{name}: {value}", a(), plain, headers={name: value})
        for name, value in {
            "accept": "text/html",
            "traceparent": "nonsense",
            "openai-organization": "x",
            "x-stainless-retry-count": "2",
            "expect-ct": "max-age=1",
            "accept-encoding": "gzip, br, zstd",
            "cookie": "a=b",
        }.items()
    ),
    ok(
        "E-HDR-05",
        "origin of ours",
        a(),
        server="keyed",
        headers={**_BEARER, "origin": ORIGIN},
        answers={"access-control-allow-origin": ORIGIN},
    ),
    *(
        Case(
            "E-HDR-05",
            f"origin of ours, {name}",
            body,
            server="keyed",
            headers={**headers, "origin": ORIGIN},
            status=status,
            answers={"access-control-allow-origin": ORIGIN},
        )
        for name, body, headers, status in (("malformed", b"{", _BEARER, 400), ("no key", a(), {}, 401))
    ),
    ok(
        "E-HDR-05",
        "another origin",
        a(),
        server="keyed",
        headers={**_BEARER, "origin": "https://other.example"},
        answers={"access-control-allow-origin": None},
    ),
    ok(
        "E-HDR-05",
        "no origins by default",
        a(),
        headers={"origin": ORIGIN},
        answers={"access-control-allow-origin": None},
    ),
    *(
        ok("E-HDR-06", f"a body in {name}", packed_json(a(), how), plain, headers={"content-encoding": name})
        for name, how in {
            "gzip": gzip.compress,
            "zstd": zstandard.compress,
            "deflate": zlib.compress,
            "identity": bytes,
        }.items()
    ),
    *(
        Case(
            "E-HDR-06 E-ERR-06",
            f"a body that unpacks to too much, {name}",
            packed_json({"input": "a" * 5000}, how),
            headers={"content-encoding": name},
            server="limited",
            status=413,
        )
        for name, how in {"gzip": gzip.compress, "zstd": zstandard.compress}.items()
    ),
    *(
        Case("E-HDR-07", f"encoding {name}", packed_json(a(), bytes), headers={"content-encoding": name}, status=415)
        for name in ("br", "lzma", "gzip2")
    ),
    *(
        Case("E-HDR-07", f"broken {name}", b"nonsense", headers={"content-encoding": name}, status=400)
        for name in ("gzip", "zstd")
    ),
    Case(
        "E-HDR-07", "a cut body", packed_json(a(), gzip.compress)[:-5], headers={"content-encoding": "gzip"}, status=400
    ),
    # Keys
    *(
        Case(
            "E-AUTH-01 E-ERR-01",
            f"authorization {value!r}",
            a(),
            server="keyed",
            headers={} if value is None else {"authorization": value},
            status=401,
            answers={"www-authenticate": "Bearer"},
        )
        for value in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            f"Basic {KEY}",
            KEY,
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
        )
    ),
    *(
        ok("E-AUTH-02", f"{scheme} {key}", a(), server="keyed", headers={"authorization": f"{scheme} {key}"})
        for scheme in ("Bearer", "bearer", "BEARER")
        for key in (KEY, OTHER_KEY)
    ),
    *(ok("E-AUTH-03", path, None, method="GET", path=path, server="keyed") for path in _OPEN),
    ok("E-AUTH-03", "POST /ping", None, path="/ping", server="keyed"),
    Case("E-AUTH-04", "metrics", None, "GET", "/metrics", server="keyed", status=401),
    ok("E-AUTH-04", "metrics with a key", None, method="GET", path="/metrics", server="keyed", headers=_BEARER),
    ok("E-AUTH-04", "open metrics", None, method="GET", path="/metrics", server="open-metrics"),
    Case(
        "E-AUTH-04 E-AUTH-05",
        "open metrics, the rest is shut",
        None,
        "GET",
        "/v1/models",
        server="open-metrics",
        status=401,
    ),
    *(Case("E-AUTH-05", path, None, "GET", path, server="keyed", status=401) for path in _SHUT),
    *(Case("E-AUTH-05", path, a(), path=path, server="keyed", status=401) for path in _SHUT_POSTS),
    Case(
        "E-AUTH-05",
        "a path there is not, with a key",
        None,
        "GET",
        "/nowhere",
        headers=_BEARER,
        server="keyed",
        status=404,
    ),
    Case("E-AUTH-05", "no key before a large body", b"{}" * 4096, server="keyed", status=401),
    *(
        ok(
            "E-AUTH-06",
            f"preflight of {path}",
            None,
            method="OPTIONS",
            path=path,
            server="keyed",
            headers={
                "origin": ORIGIN,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, content-type",
            },
            answers={"access-control-allow-origin": ORIGIN, "access-control-allow-headers": "(?i).*authorization.*"},
        )
        for path in (EMBEDDINGS, "/pooling")
    ),
    Case("E-AUTH-06", "OPTIONS that is no preflight", None, "OPTIONS", EMBEDDINGS, server="keyed", status=401),
    *(
        ok("E-AUTH-07", f"authorization {value}", a(), headers={"authorization": value})
        for value in ("Bearer unused", "Basic x", "nonsense")
    ),
    # Deadlines
    *(
        Case("E-DEAD-01 E-DEAD-02", f"{name}: {value}", {"input": SLOW}, headers={name: value}, status=504)
        for name, value in {"x-request-timeout-ms": "100", "x-stainless-read-timeout": "0.1"}.items()
    ),
    Case("E-DEAD-02", "the setting", {"input": SLOW}, server="hasty", status=504),
    ok(
        "E-DEAD-02",
        "far enough",
        {"input": SLOW},
        headers={"x-request-timeout-ms": "30000", "x-stainless-read-timeout": "600"},
    ),
    Case(
        "E-DEAD-02",
        "the nearest",
        {"input": SLOW},
        headers={"x-request-timeout-ms": "30000", "x-stainless-read-timeout": "0.1"},
        status=504,
    ),
    *(
        bad(
            "E-DEAD-03",
            f"timeout {value!r}",
            a(),
            "x-request-timeout-ms",
            "x-request-timeout-ms",
            headers={"x-request-timeout-ms": value},
        )
        for value in ("0", "-5", "1.5", "soon", "", "1e3", "0x10", "9" * 40)
    ),
    *(
        ok("E-DEAD-04", f"read timeout {value!r}", a(), plain, headers={"x-stainless-read-timeout": value})
        for value in ("not-given", "", "-1", "0", "nan", "inf", "600.0")
    ),
    # Lanes
    ok("E-LANE-01", "no lane", a(), plain),
    *(ok("E-LANE-01", lane, a(), plain, headers={"x-lane": lane}) for lane in ("interactive", "bulk")),
    *(
        bad("E-LANE-02", f"lane {lane!r}", a(), "(?s)(?=.*interactive)(?=.*bulk)", headers={"x-lane": lane})
        for lane in ("fast", "", "bulk,interactive")
    ),
    Case(
        "E-LANE-04",
        "a key of the other lane",
        a(),
        server="keyed",
        headers={"authorization": f"Bearer {BULK_KEY}", "x-lane": "interactive"},
        status=403,
    ),
    # Partial results
    _partial(
        "E-PART-01 E-PART-03 E-PART-07",
        "a long one",
        ["a", LONG, "b"],
        failing(None, (400, 1, "maximum"), None, tokens=6),
    ),
    _partial("E-PART-02", "a long one, the others", ["a", LONG, TEXT], rest_is(2, TEXT)),
    _partial("E-PART-01 E-PART-03", "a bad id", [[5], [9999], [6]], failing(None, (400, 1, "9999"), None, tokens=2)),
    _partial("E-PART-03", "an empty one", [[5], [], [6]], failing(None, (400, 1, "empty"), None)),
    _partial("E-PART-03", "fails in the model", ["a", FAIL, "b"], failing(None, (500, 1, ""), None, tokens=6)),
    _partial("E-PART-03 E-RES-09", "not finite", ["a", NOT_FINITE, "b"], failing(None, (500, 1, ""), None, tokens=6)),
    _partial("E-PART-01", "base64", ["a", LONG], failing(None, (400, 1, "maximum")), encoding_format="base64"),
    _partial("E-PART-02", "none fails", ["a", TEXT], rest_is(1, TEXT)),
    _partial("E-PART-06", "all fail", [LONG, LONG], failing((400, 0, "maximum"), (400, 1, "maximum"), tokens=0)),
    _partial("E-PART-06", "all fail in the model", [FAIL], failing((500, 0, ""), tokens=0)),
    _partial("E-PART-03", "of each kind", ["a", LONG, FAIL], failing(None, (400, 1, "maximum"), (500, 2, ""))),
    *(
        Case("E-PART-04", f"partial {form}", a(encoding_format=form), headers=_PARTIAL, status=400)
        for form in ("bytes", "bytes_only")
    ),
    *(
        Case("E-PART-05", f"x-on-error {value!r}", a(), headers={"x-on-error": value}, status=400)
        for value in ("ignore", "")
    ),
    bad("E-PART-08", "nothing", {"input": []}, "at least one prompt", headers=_PARTIAL),
    bad("E-PART-08", "a wrong size", a(dimensions=5), "Matryoshka", headers=_PARTIAL),
    Case("E-PART-08", "an unknown model", a(model="gpt-9"), headers=_PARTIAL, status=404),
    misfit("E-PART-08", "a mixed list", {"input": ["a", 5]}, headers=_PARTIAL),
    ok("E-PART-05", "x-on-error fail", a(), plain, headers={"x-on-error": "fail"}),
    Case(
        "E-PART-05", "x-on-error fail, and one does", {"input": ["a", LONG]}, headers={"x-on-error": "fail"}, status=400
    ),
    # Limits
    bad("E-LIM-01", "five inputs", {"input": ["a"] * 5}, r"(?s)(?=.*\b4\b)(?=.*\b5\b)", server="limited"),
    ok("E-LIM-01", "four inputs", {"input": ["a"] * 4}, unit, server="limited"),
    bad("E-LIM-01", "2,049 inputs", {"input": ["a"] * 2049}, r"(?s)(?=.*2048)(?=.*2049)"),
    bad("E-LIM-01", "five lists", {"input": [[5]] * 5}, r"(?s)(?=.*\b4\b)(?=.*\b5\b)", server="limited"),
    bad("E-LIM-02", "41 tokens", {"input": [[5] * 20, [5] * 21]}, r"(?s)(?=.*\b40\b)(?=.*\b41\b)", server="limited"),
    ok("E-LIM-02", "40 tokens", {"input": [[5] * 20, [5] * 20]}, lambda r, _: _same(r.tokens, 40), server="limited"),
    Case("E-LIM-02", "300,001 tokens of one input", {"input": [5] * 300_001}, status=400),
    ok("E-NUM-05", "four inputs of 115 bytes", {"input": ["a"] * 4, "encoding_format": "bytes"}, server="limited"),
    ok("E-LIM-03", "the highest id", {"input": [87, 0]}, unit),
    ok("E-HDR-01 E-RES-02", "an id with odd characters", a(), id_is('embd-a"b\\'), headers={"x-request-id": 'a"b\\'}),
]


def _lacks(reply: Reply, text: str) -> None:
    assert text.encode() not in reply.body


def _same(value: Any, expected: Any) -> None:
    assert value == expected
