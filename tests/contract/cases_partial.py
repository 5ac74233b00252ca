"""Partial results, and limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import Case, Check, bad, misfit, ok
from .cases_request import LONG, TEXT, a, id_is, plain, unit
from .client import Api, Reply
from .models import FAIL, NOT_FINITE

_PARTIAL = {"x-on-error": "partial"}


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


def _partial(rows: str, name: str, inputs: Any, check: Check, **fields: Any) -> Case:
    return ok(rows, name, {"input": inputs, **fields}, check, headers=_PARTIAL)


def _same(value: Any, expected: Any) -> None:
    assert value == expected


CASES: list[Case] = [
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
