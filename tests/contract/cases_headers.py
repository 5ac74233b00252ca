"""Headers, keys, deadlines and lanes."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from typing import Any

from .case import EMBEDDINGS, Case, bad, ok
from .cases_request import a, plain
from .models import SLOW
from .servers import BULK_KEY, KEY, ORIGIN, OTHER_KEY

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_OPEN = ("/health", "/livez", "/ready", "/ping", "/version")
_SHUT = ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/docs", "/nowhere", "/v1/nowhere")
_SHUT_POSTS = (EMBEDDINGS, "/pooling", "/tokenize", "/detokenize")
_BEARER = {"authorization": f"Bearer {KEY}"}


def packed_json(body: Any, how: Any) -> bytes:
    """A compressed body."""
    return bytes(how(json.dumps(body).encode()))


CASES: list[Case] = [
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
            "zstd": zstd.compress,
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
        for name, how in {"gzip": gzip.compress, "zstd": zstd.compress}.items()
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
    Case("E-DEAD-02", "the setting", {"input": SLOW}, server="impatient", status=504),
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
]
