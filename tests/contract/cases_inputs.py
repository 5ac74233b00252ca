"""Forms of `input`, and chat."""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import Case, Check, bad, each, misfit, ok
from .client import Api, Reply
from .models import DIM

_CLS, _SEP, _UNK = 2, 3, 1


def shaped(rows: int, tokens: int | None = None) -> Check:
    """So many vectors in order, of so many tokens together."""

    def check(reply: Reply, api: Api) -> None:
        assert reply.vectors.shape == (rows, DIM)
        assert [item["index"] for item in reply.json["data"]] == list(range(rows))
        assert tokens is None or reply.tokens == tokens

    return check


def equals(inputs: Any, **options: Any) -> Check:
    """The vectors that other inputs have."""

    def check(reply: Reply, api: Api) -> None:
        np.testing.assert_allclose(reply.vectors, api.vectors(inputs, **options), rtol=1e-4, atol=1e-5)

    return check


def both(*checks: Check) -> Check:
    """All of these."""

    def check(reply: Reply, api: Api) -> None:
        for one in checks:
            one(reply, api)

    return check


def said(content: Any, role: str = "user") -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def chat(messages: Any, **fields: Any) -> dict[str, Any]:
    """A body with messages."""
    return {"messages": messages, **fields}


def templated(*texts: str, specials: bool = False) -> Check:
    """The vectors of texts as the template writes them."""
    return equals(list(texts), add_special_tokens=specials)


_LONE = [said("queue")]
_TWO = [said("queue"), said("the", "assistant")]
_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

CASES: list[Case] = [
    ok("E-INP-01", "a string", {"input": "the queue"}, shaped(1, 4)),
    ok("E-INP-01", "a list of one", {"input": ["the queue"]}, both(shaped(1, 4), equals("the queue"))),
    ok("E-INP-01 E-RES-04", "a list of three", {"input": ["the queue", "a", "b c"]}, shaped(3, 4 + 3 + 4)),
    ok(
        "E-INP-01",
        "the same text twice",
        {"input": ["a", "a"]},
        equals(["a", "a"]),
    ),
    ok("E-INP-01", "a string equals a list of it", {"input": ["b"]}, equals("b")),
    ok("E-INP-02", "ids", {"input": [5, 6, 7]}, shaped(1, 3)),
    ok("E-INP-02", "a list of ids", {"input": [[5, 6, 7]]}, both(shaped(1, 3), equals([5, 6, 7]))),
    ok("E-INP-02", "lists of ids", {"input": [[5, 6, 7], [8], [9, 10]]}, shaped(3, 6)),
    ok("E-INP-02", "ids of specials are ids", {"input": [0, _UNK, _CLS, _SEP, 4]}, shaped(1, 5)),
    bad("E-INP-03", "nothing", {"input": []}, "at least one prompt"),
    *(
        misfit("E-INP-04 E-ERR-02", f"input {value!r}", {"input": value})
        for value in each(
            *each(
                5,
                5.5,
                True,
                {},
                {"text": "a"},
                ["a", 1],
                [1, "a"],
                ["a", None],
                [None],
                [1, None],
                ["a", ["b"]],
                [[1], 2],
            ),
            *(
                [[1], "a"],
                [["a"]],
                [[[1]]],
                [[[]]],
                [{}],
                [[1], [[2]]],
                [["a"], [1]],
                [[1, "a"]],
                [[None]],
                [[1], None],
            ),
        )
    ),
    misfit("E-INP-04 E-REQ-07", "input null", {"input": None}),
    *(
        misfit("E-INP-05 E-TYPE-02", f"ids {value!r}", {"input": value})
        for value in each([1.5], [1, 2.5], [[1], [2.5]], [1e-3], [[0.1]])
    ),
    ok("E-INP-05", "ids without a fraction", {"input": [5.0, 6]}, both(shaped(1, 2), equals([5, 6]))),
    ok("E-INP-05", "1.0 in a batch", {"input": [[5.0], [6]]}, both(shaped(2, 2), equals([[5], [6]]))),
    ok("E-INP-06", "booleans among ids", {"input": [True, 5, False]}, both(shaped(1, 3), equals([1, 5, 0]))),
    ok("E-INP-06", "booleans alone", {"input": [[True], [False]]}, both(shaped(2, 2), equals([[1], [0]]))),
    ok("E-INP-07", "digits are text", {"input": ["1", "2"]}, both(shaped(2, 6), equals(["1", "2"]))),
    *(
        bad("E-INP-08 E-LIM-03", f"ids {value!r}", {"input": value}, f"Token id {wrong} is out of vocabulary")
        for value, wrong in (
            *(([9999], 9999), ([5, -1], -1), ([[5], [6, 88]], 88), ([[-5]], -5), ([2**31], 2**31), ([2**40], 2**40)),
            ([-(2**40)], -(2**40)),
        )
    ),
    ok("E-INP-08", "the last id there is", {"input": [87]}, shaped(1, 1)),
    *(
        bad("E-INP-09", f"input {value!r}", {"input": value}, "decoder prompt cannot be empty")
        for value in each([[]], [[5], []], [[], [5]])
    ),
    *(
        bad(
            "E-INP-09",
            f"text {value!r} without specials",
            {"input": value, "add_special_tokens": False},
            "cannot be empty",
        )
        for value in each("", ["a", ""], [" "])
    ),
    ok("E-INP-10", "an empty text", {"input": ""}, both(shaped(1, 2), equals([_CLS, _SEP]))),
    ok("E-INP-10", "empty texts", {"input": ["", "a", ""]}, shaped(3, 7)),
    ok("E-INP-11", "ids of a text", {"input": [_CLS, 85, 87, _SEP]}, equals("the queue")),
    ok("E-INP-11", "ids without specials", {"input": [85, 87]}, equals("the queue", add_special_tokens=False)),
    *(
        ok("E-INP-13", f"lower-cased, {name}", {"input": "THE QuEuE"}, equals("the queue"), server=name)
        for name in ("tiny", "raw")
    ),
    # Chat
    ok("E-CHAT-01", "one conversation", chat(_LONE), templated("user queue "), server="any"),
    ok("E-CHAT-01", "two turns", chat(_TWO), both(shaped(1), templated("user queue assistant the ")), server="any"),
    ok(
        "E-CHAT-02", "a batch", chat([_LONE, _TWO]), templated("user queue ", "user queue assistant the "), server="any"
    ),
    ok("E-CHAT-02", "in input", {"input": _TWO}, templated("user queue assistant the "), server="any"),
    ok(
        "E-CHAT-02",
        "a batch in input",
        {"input": [_LONE, _LONE]},
        templated("user queue ", "user queue "),
        server="any",
    ),
    *(
        bad("E-CHAT-03", name, body, "As of transformers v4.44, default chat template is no longer allowed")
        for name, body in {"messages": chat(_LONE), "a batch": chat([_LONE]), "in input": {"input": _LONE}}.items()
    ),
    ok(
        "E-CHAT-04",
        "with specials",
        chat(_LONE, add_special_tokens=True),
        templated("user queue ", specials=True),
        server="any",
    ),
    ok("E-CHAT-04", "specials by default", chat(_LONE), lambda r, api: _fewer(r, api), server="any"),
    ok(
        "E-CHAT-05",
        "add_generation_prompt",
        chat(_LONE, add_generation_prompt=True),
        templated("user queue queue"),
        server="any",
    ),
    Case(
        "E-CHAT-06",
        "both ways to end",
        chat(_LONE, add_generation_prompt=True, continue_final_message=True),
        server="any",
        status=400,
    ),
    Case("E-CHAT-07", "a template of one's own", chat(_LONE, chat_template="{{ 1 }}"), server="any", status=400),
    ok(
        "E-CHAT-07",
        "a template that is trusted",
        chat(_LONE, chat_template="the {{ messages[0]['content'] }}"),
        templated("the queue"),
        server="auto",
    ),
    ok(
        "E-CHAT-08",
        "text parts",
        chat([said([{"type": "text", "text": "queue"}])]),
        templated("user queue "),
        server="any",
    ),
    Case("E-CHAT-08", "a picture", chat([said([_PICTURE])]), server="any", status=400),
    *(
        misfit("E-CHAT-09", f"messages {value!r}"[:50], chat(value), server="any")
        for value in each(
            "a",
            5,
            {},
            [5],
            ["a"],
            [{}],
            [{"role": "user", "content": 5}],
            [{"content": "a"}],
            [[said("a")], 5],
        )
    ),
    Case("E-CHAT-09", "no messages", chat([]), server="any", status=400),
    Case("E-CHAT-09", "an empty conversation", chat([[]]), server="any", status=400),
    ok("E-CHAT-10", "media_io_kwargs", chat(_LONE, media_io_kwargs={"a": {}}), templated("user queue "), server="any"),
    ok(
        "E-CHAT-10",
        "chat_template_kwargs",
        chat(_LONE, chat_template_kwargs={"style": "the"}),
        templated("user queue the"),
        server="any",
    ),
]


def _fewer(reply: Reply, api: Api) -> None:
    assert reply.tokens == api.post({"input": "user queue "}).tokens - 2
