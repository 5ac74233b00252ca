"""Truncation, and long inputs in chunks."""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import Case, Check, bad, each, misfit, ok
from .cases_inputs import both, equals, shaped
from .cases_request import LONG, a, plain
from .client import Api, Reply
from .models import LENGTH

_CLS, _SEP, _THE, _QUEUE = 2, 3, 85, 87
_WORDS = "the queue a b c d e f g h"
"""12 tokens with specials."""
_IDS = [_CLS, _THE, _QUEUE, *range(5, 13), _SEP]
_EXACT = "the " * (LENGTH - 2)
_HUGE = "x " * 200
_LONG_IDS = [_CLS, *[_THE, _QUEUE] * 60, _SEP]
_LONG_TEXT = "the queue " * 60


def cut(count: int, *, rows: int = 1, tokens: int | None = None) -> Check:
    """So many inputs lost tokens."""

    def check(reply: Reply, api: Api) -> None:
        assert reply.headers["x-truncated-inputs"] == str(count)
        assert reply.vectors.shape[0] == rows
        assert tokens is None or reply.tokens == tokens

    return check


def to(n: object, **more: Any) -> dict[str, Any]:
    """A body that is cut to n tokens."""
    return {"input": _WORDS, "truncate_prompt_tokens": n, **more}


def chunked(ids: list[int], *, again: bool) -> Check:
    """The weighted mean of the pieces, of unit length if asked for."""

    def check(reply: Reply, api: Api) -> None:
        pieces = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
        vectors = api.vectors(pieces, **({} if again else {"use_activation": False}))
        mean = np.average(
            vectors,
            axis=0,
            weights=[len(piece) for piece in pieces],
        )
        expected = mean / np.linalg.norm(mean) if again else mean
        np.testing.assert_allclose(reply.vectors, [expected], rtol=1e-4, atol=1e-5)
        assert reply.tokens == len(ids)
        assert reply.headers["x-truncated-inputs"] == "0"

    return check


CASES: list[Case] = [
    # Refused by default
    bad(
        "E-TRUNC-01",
        "one too many",
        {"input": LONG[:-4]},
        rf"maximum context length is {LENGTH} tokens",
        "input_tokens",
    ),
    bad(
        "E-TRUNC-01 E-ERR-13",
        "the words that clients look for",
        {"input": LONG},
        rf"(?s)at least {LENGTH + 1} input tokens.*\(parameter=input_tokens, value={LENGTH + 1}\)",
        "input_tokens",
    ),
    bad("E-TRUNC-01", "ids", {"input": [5] * (LENGTH + 1)}, "maximum context length is", "input_tokens"),
    ok("E-TRUNC-01", "without specials two more fit", {"input": LONG, "add_special_tokens": False}, shaped(1, LENGTH)),
    ok("E-TRUNC-01", "exactly L", {"input": _EXACT}, both(cut(0), shaped(1, LENGTH))),
    ok("E-TRUNC-01", "exactly L ids", {"input": [5] * LENGTH}, both(cut(0), shaped(1, LENGTH))),
    bad("E-TRUNC-02", "a huge text", {"input": _HUGE}, "maximum context length is", "input_text"),
    bad(
        "E-TRUNC-02", "a huge text among others", {"input": ["a", _HUGE * 9]}, "maximum context length is", "input_text"
    ),
    # Values of n
    *(
        bad("E-TRUNC-03", f"n {n}", to(n), "truncate_prompt_tokens value is greater than max_model_len")
        for n in (LENGTH + 1, 64, 100_000)
    ),
    bad(
        "E-TRUNC-03",
        "n above L for ids",
        {"input": [5], "truncate_prompt_tokens": LENGTH + 1},
        "greater than max_model_len",
    ),
    ok("E-TRUNC-03", "n = L", to(LENGTH), cut(0, tokens=12)),
    *(Case("E-TRUNC-04", f"n {n}", to(n), status=400, message="truncate_prompt_tokens") for n in (-2, -100)),
    *(misfit("E-TRUNC-04 E-TYPE-02", f"n {n!r}", to(n), "body.truncate_prompt_tokens") for n in (1.5, "x", [4])),
    ok(
        "E-TRUNC-05", "n -1", {"input": LONG, "truncate_prompt_tokens": -1}, both(cut(1, tokens=LENGTH), equals(_EXACT))
    ),
    ok("E-TRUNC-05", "n -1 for a short text", to(-1), both(cut(0, tokens=12), equals(_WORDS))),
    ok("E-TRUNC-05", "n -1 for ids", {"input": [5] * 60, "truncate_prompt_tokens": -1}, cut(1, tokens=LENGTH)),
    ok(
        "E-TRUNC-05 E-TRUNC-02",
        "n -1 for a huge text",
        {"input": _HUGE, "truncate_prompt_tokens": -1},
        cut(1, tokens=LENGTH),
    ),
    # Sides
    ok("E-TRUNC-06 E-TRUNC-14", "no side", to(5), both(cut(1, tokens=5), equals([*_IDS[:4], _SEP]))),
    ok("E-TRUNC-06", "side null", to(5, truncation_side=None), equals([*_IDS[:4], _SEP])),
    ok(
        "E-TRUNC-06",
        "a tokenizer that cuts on the left",
        to(5),
        both(cut(1, tokens=5), equals([_CLS, *_IDS[-4:]])),
        server="any",
    ),
    ok("E-TRUNC-06", "no specials to keep", to(4, add_special_tokens=False), both(cut(1, tokens=4), equals(_IDS[1:5]))),
    ok("E-TRUNC-07", "right", to(5, truncation_side="right"), both(cut(1, tokens=5), equals(_IDS[:5]))),
    ok("E-TRUNC-07", "left", to(5, truncation_side="left"), both(cut(1, tokens=5), equals(_IDS[-5:]))),
    ok("E-TRUNC-07", "right against the tokenizer", to(5, truncation_side="right"), equals(_IDS[:5]), server="any"),
    ok("E-TRUNC-07", "left, n 1", to(1, truncation_side="left"), both(cut(1, tokens=1), equals([_SEP]))),
    ok("E-TRUNC-07", "right, n 1", to(1, truncation_side="right"), both(cut(1, tokens=1), equals([_CLS]))),
    ok(
        "E-TRUNC-07",
        "left, n -1",
        {"input": LONG, "truncate_prompt_tokens": -1, "truncation_side": "left"},
        both(cut(1, tokens=LENGTH), equals([*[_THE] * (LENGTH - 1), _SEP])),
    ),
    ok("E-TRUNC-07", "left, not cut", to(12, truncation_side="left"), both(cut(0, tokens=12), equals(_WORDS))),
    *(
        ok("E-TRUNC-08", f"ids, side {side}", to(4, input=_IDS, **extra), both(cut(1, tokens=4), equals(expected)))
        for side, extra, expected in each(
            ("null", {}, _IDS[:4]),
            ("right", {"truncation_side": "right"}, _IDS[:4]),
            ("left", {"truncation_side": "left"}, _IDS[-4:]),
        )
    ),
    ok("E-TRUNC-08", "ids, a tokenizer that cuts on the left", to(4, input=_IDS), equals(_IDS[-4:]), server="any"),
    ok("E-TRUNC-08", "n 1", to(1, input=_IDS), both(cut(1, tokens=1), equals([_CLS]))),
    *(
        Case("E-TRUNC-09", f"n 0, {name}", to(0, **extra), status=400, type="BadRequestError")
        for name, extra in each(
            ("text", {}),
            ("ids", {"input": _IDS}),
            ("left", {"truncation_side": "left"}),
            ("no specials", {"add_special_tokens": False}),
        )
    ),
    *(bad("E-TRUNC-10", f"n {n}", to(n), r"at least 3\b", "truncate_prompt_tokens") for n in (1, 2)),
    ok("E-TRUNC-10", "n 3", to(3), both(cut(1, tokens=3), equals([_CLS, _THE, _SEP]))),
    ok("E-TRUNC-10", "n 1 without specials", to(1, add_special_tokens=False), equals([_THE])),
    # Counted
    ok(
        "E-TRUNC-11 E-TRUNC-12 E-HDR-04",
        "two of three",
        to(6, input=[_WORDS, "a", _WORDS]),
        cut(2, rows=3, tokens=6 + 3 + 6),
    ),
    ok("E-TRUNC-11 E-HDR-04", "none", a(), cut(0)),
    ok(
        "E-TRUNC-11 E-HDR-04",
        "with bytes",
        to(6, encoding_format="bytes_only"),
        lambda r, _: None,
        answers={"x-truncated-inputs": "1"},
    ),
    ok("E-TRUNC-12", "usage", {"input": ["a", "a", "the queue"]}, shaped(3, 3 + 3 + 4)),
    # By default
    *(
        ok(
            "E-TRUNC-13",
            f"{server}: a long text",
            {"input": LONG},
            both(cut(1, tokens=LENGTH), equals(_EXACT)),
            server=server,
        )
        for server in ("truncating", "auto")
    ),
    *(
        ok("E-TRUNC-13", f"{server}: ids", {"input": [5] * 60}, cut(1, tokens=LENGTH), server=server)
        for server in ("truncating", "auto")
    ),
    ok("E-TRUNC-13", "n goes before", to(5), cut(1, tokens=5), server="truncating"),
    bad("E-TRUNC-13", "n above L", to(99), "greater than max_model_len", server="truncating"),
    ok(
        "E-TRUNC-13",
        "null is the default",
        {"input": LONG, "truncate_prompt_tokens": None},
        cut(1),
        server="truncating",
    ),
    # Chunks
    ok(
        "E-CHUNK-01 E-CHUNK-02 E-CHUNK-03",
        "a text",
        {"input": _LONG_TEXT},
        chunked(_LONG_IDS, again=True),
        server="chunking",
    ),
    ok("E-CHUNK-01 E-CHUNK-02", "ids", {"input": _LONG_IDS}, chunked(_LONG_IDS, again=True), server="chunking"),
    ok(
        "E-CHUNK-02",
        "left as it is",
        a(input=_LONG_IDS, use_activation=False),
        chunked(_LONG_IDS, again=False),
        server="chunking",
    ),
    ok(
        "E-CHUNK-02",
        "among others",
        {"input": ["a", _LONG_TEXT, "b"]},
        lambda r, api: np.testing.assert_allclose(
            r.vectors, np.concatenate([api.vectors("a"), api.vectors(_LONG_TEXT), api.vectors("b")]), atol=1e-5
        ),
        server="chunking",
    ),
    ok(
        "E-CHUNK-02 E-DIM-06",
        "shortened",
        {"input": _LONG_IDS, "dimensions": 8},
        lambda r, _: np.testing.assert_allclose(np.linalg.norm(r.vectors), 1, atol=1e-5),
        server="chunking",
    ),
    ok(
        "E-CHUNK-03",
        "one token more than L",
        {"input": [5] * (LENGTH + 1)},
        chunked([5] * (LENGTH + 1), again=True),
        server="chunking",
    ),
    ok(
        "E-CHUNK-04",
        "n -1",
        {"input": _LONG_IDS, "truncate_prompt_tokens": -1},
        cut(1, tokens=LENGTH),
        server="chunking",
    ),
    ok("E-CHUNK-04", "n 5", to(5), cut(1, tokens=5), server="chunking"),
    bad("E-CHUNK-04", "n above L", to(LENGTH + 1), "greater than max_model_len", server="chunking"),
    ok("E-CHUNK-05", "exactly L", {"input": [5] * LENGTH}, both(cut(0), shaped(1, LENGTH)), server="chunking"),
    ok("E-CHUNK-05", "a short text", a(), plain, server="chunking"),
    bad("E-CHUNK-06 E-LIM-02", "too many tokens", {"input": [[5] * 300] * 2}, "500", server="chunking"),
]
