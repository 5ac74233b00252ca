"""Fields of the request, types, and what is looked at first."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .case import Case, bad, each, misfit, ok
from .client import Api, Reply
from .models import DIM, LENGTH

LONG = "the " * LENGTH
"""L + 2 tokens with specials."""
TEXT = "the queue"


def a(**fields: Any) -> dict[str, Any]:
    """A body with a text, and these fields."""
    return {"input": TEXT, **fields}


def plain(reply: Reply, api: Api) -> None:
    """The field had no effect on the vector."""
    np.testing.assert_allclose(reply.vectors, api.vectors(TEXT), atol=1e-6)


def unit(reply: Reply, api: Api) -> None:
    """Vectors of unit length."""
    np.testing.assert_allclose(np.linalg.norm(reply.vectors, axis=1), 1, atol=1e-5)


def as_pooled(reply: Reply, api: Api) -> None:
    """Vectors that are not of unit length, and have the direction of those that are."""
    lengths = np.linalg.norm(reply.vectors, axis=1, keepdims=True)
    assert abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(reply.vectors / lengths, api.vectors(TEXT, use_activation=True), atol=1e-5)


def padded(reply: Reply, api: Api) -> None:
    """The vector as ever, and tokens counted up to the limit."""
    plain(reply, api)
    assert reply.tokens == LENGTH


def model_shown(name: str) -> Any:
    def check(reply: Reply, api: Api) -> None:
        assert reply.json["model"] == name

    return check


def id_is(pattern: str) -> Any:
    def check(reply: Reply, api: Api) -> None:
        assert reply.json["id"] == pattern

    return check


_OPTIONAL = [
    *("model", "encoding_format", "dimensions", "user", "truncate_prompt_tokens", "truncation_side", "padding"),
    *("add_special_tokens", "embed_dtype", "endianness", "use_activation", "normalize", "request_id", "priority"),
    *("cache_salt", "mm_processor_kwargs", "task", "prompt_name", "input_type", "messages"),
]
_WORDS = {
    "encoding_format": ("E-REQ-08", ["float", "base64"]),
    "embed_dtype": ("E-REQ-09", ["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]),
    "endianness": ("E-REQ-10", ["native", "little", "big"]),
    "truncation_side": ("E-REQ-23", ["left", "right"]),
    "padding": ("E-REQ-21", ["do_not_pad"]),
}

CASES: list[Case] = [
    # The body and its type
    *(
        misfit("E-REQ-01 E-ERR-02", f"body {body!r}", body)
        for body in (b"", b"{", b"[]", b"5", b'"text"', b"null", b"true", b"{'input': 'a'}", b'{"input": "a"', b"\x00")
    ),
    misfit("E-REQ-01", "an array of requests", [a()]),
    misfit("E-REQ-01", "something behind the object", b'{"input": "a"} x'),
    *(
        ok("E-REQ-02", f"content type {kind}", a(), plain, headers={"content-type": kind})
        for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8")
    ),
    *(
        misfit("E-REQ-02", f"content type {kind!r}", a(), None, headers={"content-type": kind})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "json")
    ),
    misfit("E-REQ-02", "no content type", a(), None, raw=True),
    *(
        ok("E-REQ-03", f"unknown field {name}", a(**{name: value}), plain)
        for name, value in {
            "stream": True,
            "foo": {"bar": [1]},
            "n": "x",
            "dimension": 4,
        }.items()
    ),
    *(ok("E-REQ-04", f"{name} null", a(**{name: None}), plain) for name in _OPTIONAL),
    ok("E-REQ-04", "all of them null", a(**dict.fromkeys(_OPTIONAL)), plain),
    # The model
    ok("E-REQ-05", "no model", a(), model_shown("tiny")),
    *(ok("E-REQ-05", f"model {name!r}", a(model=name), model_shown("tiny")) for name in ("", "tiny", "owner/tiny")),
    *(
        Case("E-REQ-06", f"model {name!r}", a(model=name), status=404, param=None, message=f"`{name}` does not exist")
        for name in ("gpt-9", "Tiny", "tiny ", "owner/other")
    ),
    misfit("E-TYPE-04", "a number for the model", a(model=5), "body.model"),
    misfit("E-TYPE-04", "a list for the model", a(model=["tiny"]), "body.model"),
    # input
    misfit("E-REQ-07 E-ERR-02", "neither input nor messages", {"model": "tiny"}, "body.input"),
    misfit("E-REQ-07", "an empty object", {}, "body.input"),
    # Words
    *(ok(row, f"{name} {word}", a(**{name: word})) for name, (row, words) in _WORDS.items() for word in words),
    *(
        ok(
            "E-REQ-08",
            f"encoding_format {word}",
            a(encoding_format=word),
            answers={"content-type": "application/octet-stream"},
        )
        for word in ("bytes", "bytes_only")
    ),
    *(
        misfit(f"{row} E-REQ-11", f"{name} {word!r}", a(**{name: word}), f"body.{name}", rf"literal_error(.|\n)*{word}")
        for name, (row, words) in _WORDS.items()
        for word in ("bad", words[0].upper())
    ),
    *(misfit("E-REQ-11", f"{name} 1", a(**{name: 1}), f"body.{name}", "literal_error") for name in _WORDS),
    misfit("E-REQ-11", "encoding_format empty", a(encoding_format=""), "body.encoding_format", "literal_error"),
    # user
    ok("E-REQ-12", "user", a(user="me"), plain),
    misfit("E-REQ-12 E-TYPE-04", "a number for the user", a(user=5), "body.user"),
    # normalize, use_activation
    *(
        ok("E-REQ-13", f"{name} true", a(**{name: True}), unit, server="raw")
        for name in ("normalize", "use_activation")
    ),
    *(ok("E-REQ-13", f"{name} false", a(**{name: False}), as_pooled) for name in ("normalize", "use_activation")),
    *(
        bad(
            "E-REQ-14",
            f"normalize {one}, use_activation {not one}",
            a(normalize=one, use_activation=not one),
            "",
            "normalize",
        )
        for one in (True, False)
    ),
    ok("E-REQ-14", "both true", a(normalize=True, use_activation=True), unit),
    ok("E-REQ-14", "both false", a(normalize=False, use_activation=False), as_pooled),
    ok("E-REQ-14", "one null", a(normalize=None, use_activation=False), as_pooled),
    ok("E-REQ-15", "a model with a Normalize module", a(), unit),
    ok("E-REQ-15", "a model without", a(), as_pooled, server="raw"),
    ok("E-REQ-15", "null with a Normalize module", a(normalize=None), unit),
    # add_special_tokens
    ok("E-REQ-16", "specials", a(), lambda reply, _: _same(reply.tokens, 4)),
    ok("E-REQ-16", "no specials", a(add_special_tokens=False), lambda reply, _: _same(reply.tokens, 2)),
    ok(
        "E-REQ-16",
        "ids get none",
        {"input": [5, 6], "add_special_tokens": True},
        lambda reply, _: _same(reply.tokens, 2),
    ),
    # Without effect
    ok("E-REQ-17 E-RES-02", "request_id", a(request_id="mine"), id_is("embd-mine")),
    ok("E-REQ-17 E-RES-02", "header before body", a(request_id="mine"), id_is("embd-h"), headers={"x-request-id": "h"}),
    misfit("E-REQ-17", "a number for the request_id", a(request_id=5), "body.request_id"),
    *(
        ok("E-REQ-18", f"priority {value}", a(priority=value), plain)
        for value in each(0, 5, -3, 2**63 - 1, -(2**63), "7")
    ),
    *(
        misfit("E-REQ-18 E-TYPE-07", f"priority {value}", a(priority=value), "body.priority")
        for value in each(2**63, -(2**63) - 1, 1.5, "high")
    ),
    *(ok("E-REQ-19", f"cache_salt {salt[:9]}", a(cache_salt=salt), plain) for salt in ("x", "s" * 128, "söl.t-1_")),
    *(
        Case("E-REQ-19", f"cache_salt {salt[:9]!r}", a(cache_salt=salt), status=400)
        for salt in ("", "s" * 129, "a@b", "a/b", "a\\b", "a\0b")
    ),
    misfit("E-REQ-19", "a number for the cache_salt", a(cache_salt=5), "body.cache_salt"),
    ok("E-REQ-20", "mm_processor_kwargs empty", a(mm_processor_kwargs={}), plain),
    Case("E-REQ-20", "mm_processor_kwargs", a(mm_processor_kwargs={"a": 1}), status=400),
    misfit("E-REQ-20", "mm_processor_kwargs a list", a(mm_processor_kwargs=[1]), "body.mm_processor_kwargs"),
    ok(
        "E-REQ-21",
        "padding max_length",
        a(padding="max_length"),
        padded,
    ),
    ok("E-REQ-22", "task null", a(task=None), plain),
    *(
        bad("E-REQ-22 E-ERR-13", f"task {task}", a(task=task), rf"\(parameter=task, value={task}\)", "task")
        for task in ("retrieval.query", "nonsense", "")
    ),
    misfit("E-REQ-22 E-TYPE-04", "a number for the task", a(task=5), "body.task"),
    ok("E-REQ-24", "input and messages", a(messages=[{"role": "user", "content": "x"}]), plain),
    # Types
    ok("E-TYPE-01", "dimensions as digits", a(dimensions="8"), lambda reply, _: _same(reply.vectors.shape, (1, 8))),
    ok("E-TYPE-01", "dimensions 8.0", a(dimensions=8.0), lambda reply, _: _same(reply.vectors.shape, (1, 8))),
    ok("E-TYPE-01", "n as digits", a(truncate_prompt_tokens="3"), lambda reply, _: _same(reply.tokens, 3)),
    *(
        misfit("E-TYPE-02", f"{name} {value!r}", a(**{name: value}), f"body.{name}")
        for name in ("dimensions", "truncate_prompt_tokens")
        for value in each(8.5, "many", [8], {}, "8.5", "")
    ),
    *(
        ok("E-TYPE-03", f"{name} {value!r}", a(**{name: value}), unit)
        for name in ("normalize", "use_activation")
        for value in each(1, "true", "on", "1", 1.0, "yes")
    ),
    *(
        ok("E-TYPE-03", f"use_activation {value!r}", a(use_activation=value), as_pooled)
        for value in each(0, "false", "off")
    ),
    *(
        misfit("E-TYPE-03", f"{name} {value!r}", a(**{name: value}), f"body.{name}")
        for name in ("normalize", "use_activation", "add_special_tokens")
        for value in each("maybe", 2, [], "")
    ),
    *(
        Case("E-TYPE-05", name, body, status=400)
        for name, body in {
            "invalid UTF-8": b'{"input": "\xff\xfe"}',
            "a cut UTF-8 sequence": b'{"input": "\xe2\x82"}',
            "a lone surrogate": b'{"input": "a \\ud800 b"}',
            "a surrogate as bytes": b'{"input": "\xed\xa0\x80"}',
            "NaN": b'{"input": "a", "dimensions": NaN}',
            "Infinity in ids": b'{"input": [1, Infinity]}',
            "deep nesting": b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}",
            "deep nesting in an unknown field": b'{"input": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "a number that overflows": b'{"input": [1e999]}',
        }.items()
    ),
    *(
        ok("E-TYPE-06", f"text {text!r}", {"input": text})
        for text in (
            "a\0b",
            "\0",
            "👩‍👩‍👧‍👦 🎉",
            "\u202eabc",
            "Ünïcödé ﬁ",
            "\ud83d\ude00",
            "\uffff",
            " \t\r\n",
            "[CLS] [SEP]",
        )
    ),
    ok("E-TYPE-05", "a byte order mark", b'\xef\xbb\xbf{"input": "the queue"}', plain),
    ok("E-TYPE-06", "escaped pair of surrogates", b'{"input": "\\ud83d\\ude00"}'),
    *(
        Case("E-TYPE-07", f"{name} {label}", a(**{name: value}), status=400)
        for name in ("dimensions", "truncate_prompt_tokens")
        for label, value in {"2^63": 2**63, "2^64": 2**64, "10^30": 10**30, "-2^63": -(2**63)}.items()
    ),
    Case("E-TYPE-07", "an id of 2^64", {"input": [2**64]}, status=400),
    Case("E-TYPE-07", "an id of 10^30", {"input": [[1], [10**30]]}, status=400),
    Case("E-TYPE-07", "an id of 1e30", {"input": [1e30]}, status=400),
    # Order
    misfit("E-ORD-01", "schema before model", {"input": 5, "model": "gpt-9"}),
    misfit(
        "E-ORD-01",
        "content type before model",
        {"input": "a", "model": "gpt-9"},
        headers={"content-type": "text/plain"},
    ),
    Case("E-ORD-02", "model before n", a(model="gpt-9", truncate_prompt_tokens=99), status=404),
    Case("E-ORD-02", "model before length", {"input": LONG, "model": "gpt-9"}, status=404),
    Case("E-ORD-02", "model before the empty list", {"input": [], "model": "gpt-9"}, status=404),
    bad("E-ORD-03", "n before length", {"input": LONG, "truncate_prompt_tokens": 99}, "greater than max_model_len"),
    bad(
        "E-ORD-03",
        "n before vocabulary",
        {"input": [[9999]], "truncate_prompt_tokens": 99},
        "greater than max_model_len",
    ),
    bad("E-ORD-04", "length before size", {"input": LONG, "dimensions": 5}, "maximum context length"),
    bad("E-ORD-04", "length of ids before size", {"input": [1] * 99, "dimensions": 5}, "maximum context length"),
    bad("E-ORD-05", "size before vocabulary", {"input": [9999], "dimensions": 5}, "Matryoshka"),
    bad("E-ORD-05", "size before the empty prompt", {"input": [[]], "dimensions": 5}, "Matryoshka"),
    bad("E-ORD-04", "length before vocabulary", {"input": [9999] * 99}, "maximum context length"),
    bad("E-ORD-06", "a long one among others", {"input": ["a", LONG, "b"]}, "maximum context length"),
    bad("E-ORD-06", "a bad id among others", {"input": [[5], [9999], [6]]}, "Token id 9999 is out of vocabulary"),
    bad("E-ORD-06", "an empty one among others", {"input": [[5], []]}, "cannot be empty"),
]


def _same(value: Any, expected: Any) -> None:
    assert value == expected


def _created_now(reply: Reply, api: Api) -> None:
    assert abs(reply.json["created"] - time.time()) < 60
    assert reply.vectors.shape == (1, DIM)


CASES.append(ok("E-RES-03", "created", a(), _created_now))
