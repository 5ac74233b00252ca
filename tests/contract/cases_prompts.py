"""Prompts, adapters, and what follows the pooling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .case import Case, Check, bad, misfit, ok
from .cases_inputs import both, chat, equals, said, shaped
from .cases_neighbours import cards, get
from .cases_pooling import pooled
from .cases_request import LONG, TEXT, a, plain
from .client import Api, Reply, unpacked
from .models import DIM, HEAD_DIM, LENGTH, OTHER_PROMPTS, PROMPTS, TASKS

_TOKENS = 4
"""Of TEXT, with specials."""
_ROLES = {
    "query": ("query", "search_query"),
    "passage": ("document", "search_document", "passage", "corpus"),
    "nothing": ("nothing",),
}
_IDS = [2, 85, 87, 3]
_STRINGS = ("prompt_name", "input_type")
_KNOWN = "it has `query`, `passage`, `nothing`"


def after(prompt: str) -> Check:
    """The vector of the text with this before it, and its tokens."""
    tokens = _TOKENS + len(prompt.split())
    return both(shaped(1, tokens), equals(prompt + TEXT, prompt_name=""))


def shaped_as(dim: int, tokens: int) -> Check:
    """One vector of this size, of so many tokens."""

    def check(reply: Reply, api: Api) -> None:
        assert reply.vectors.shape == (1, dim)
        assert reply.tokens == tokens

    return check


def prompted(rows: str, name: str, fields: dict[str, Any], check: Check, server: str = "prompted", **more: Any) -> Case:
    """A text with these fields, that is answered."""
    return ok(rows, f"{server}, {name}", a(**fields), check, server=server, **more)


def refused(rows: str, name: str, fields: dict[str, Any], param: str, message: str = "", **more: Any) -> Case:
    """A text with these fields, that is refused."""
    return bad(rows, name, a(**fields), message, param, **{"server": "prompted", **more})


def other_than(**options: Any) -> Check:
    """Not the vector that the same text has otherwise."""

    def check(reply: Reply, api: Api) -> None:
        assert abs(reply.vectors - api.vectors(TEXT, **options)).max() > 1e-3

    return check


def as_task(task: str | None, **options: Any) -> Check:
    """The vector of the text with this adapter."""
    return equals(TEXT, **{"task": task, "prompt_name": "", **options})


def in_pooling(**options: Any) -> Check:
    """One vector, that of /v1/embeddings with other options."""

    def check(reply: Reply, api: Api) -> None:
        np.testing.assert_allclose([reply.json["data"][0]["data"]], api.vectors(TEXT, **options), atol=1e-5)

    return check


def token_matrices(reply: Reply, api: Api) -> None:
    """Hidden states of four and three tokens, in bytes."""
    entries = json.loads(reply.headers["metadata"])["data"]
    assert [entry["shape"] for entry in entries] == [[4, DIM], [3, DIM]]
    assert [(entry["start"], entry["end"]) for entry in entries] == [(0, 4 * DIM * 2), (4 * DIM * 2, 7 * DIM * 2)]
    assert unpacked(reply.body, "float16").shape == (7 * DIM,)


def packed(reply: Reply, api: Api) -> None:
    """One vector for each input, in bytes."""
    entries = json.loads(reply.headers["metadata"])["data"]
    assert [entry["shape"] for entry in entries] == [[HEAD_DIM], [HEAD_DIM]]
    np.testing.assert_allclose(
        unpacked(reply.body).reshape(2, HEAD_DIM), api.vectors([TEXT, "a"]), rtol=1e-4, atol=1e-5
    )


def _dim(reply: Reply, dim: int) -> None:
    assert np.array(reply.json["data"][0]["data"]).shape == (_TOKENS, dim)


CASES: list[Case] = [
    # Prompts by their names
    prompted("E-INP-12", "the default", {}, after(PROMPTS["passage"])),
    prompted("E-INP-12 E-PROMPT-01", "null", {"prompt_name": None, "input_type": None}, after(PROMPTS["passage"])),
    prompted("E-PROMPT-01", "none", {"prompt_name": ""}, both(shaped(1, _TOKENS), equals(_IDS))),
    *(prompted("E-PROMPT-01", name, {"prompt_name": name}, after(text)) for name, text in PROMPTS.items()),
    prompted("E-PROMPT-01", "no default", {}, shaped_as(HEAD_DIM, _TOKENS), server="headed"),
    *(
        pooled("E-PROMPT-01", f"prompt {fields}", in_pooling(**fields), server="prompted", **fields)
        for fields in ({}, {"prompt_name": "query"}, {"prompt_name": ""}, {"input_type": "query"})
    ),
    *(
        refused("E-PROMPT-02 E-ERR-13", f"name {name[:20]!r}", {"prompt_name": name}, "prompt_name", message)
        for name, message in {
            "poem": rf"{_KNOWN}\. \(parameter=prompt_name, value=poem\)",
            "Query": _KNOWN,
            "search_query": _KNOWN,
            "-": r"\(parameter=prompt_name, value=-\)",
            "role:query": "prompt_name",
            "x" * 100_000: _KNOWN,
        }.items()
    ),
    refused("E-PROMPT-02", "a name without prompts", {"prompt_name": "query"}, "prompt_name", "none", server="tiny"),
    ok("E-PROMPT-02", "no name without prompts", a(prompt_name=""), plain),
    *(misfit("E-TYPE-04", f"a number for the {name}", a(**{name: 5}), f"body.{name}") for name in _STRINGS),
    # by what the texts are for
    *(
        prompted("E-PROMPT-03", f"input_type {word}", {"input_type": word}, after(PROMPTS[name]))
        for name, words in _ROLES.items()
        for word in words
    ),
    prompted("E-PROMPT-03", "no prompt for it", {"input_type": "document"}, after(""), server="tasked"),
    prompted(
        "E-PROMPT-09",
        "a prompt of another name",
        {"input_type": "query", "task": TASKS[1]},
        both(shaped(1, _TOKENS + 1), as_task(TASKS[1], prompt_name=TASKS[0])),
        server="tasked",
    ),
    prompted("E-PROMPT-05", "input_type empty", {"input_type": ""}, after(PROMPTS["passage"])),
    *(
        refused("E-PROMPT-04 E-ERR-13", f"input_type {word[:20]}", {"input_type": word}, "input_type", _KNOWN)
        for word in ("poem", "QUERY", "classification", "x" * 100_000)
    ),
    *(
        ok("E-PROMPT-04", f"input_type {word[:20]} without prompts", a(input_type=word), plain)
        for word in ("query", "search_document", "poem", "", "-", "role:query", "x" * 100_000)
    ),
    ok("E-PROMPT-04", "without prompts, ids", {"input": _IDS, "input_type": "query"}, plain),
    # both
    prompted("E-PROMPT-05", "twice", {"prompt_name": "query", "input_type": "search_query"}, after(PROMPTS["query"])),
    prompted("E-PROMPT-05", "twice none", {"prompt_name": "", "input_type": "nothing"}, after("")),
    *(
        refused(
            "E-PROMPT-05", f"name {name!r}, input_type {word}", {"prompt_name": name, "input_type": word}, "prompt_name"
        )
        for name, word in (("query", "document"), ("passage", "query"), ("", "query"), ("nothing", "query"))
    ),
    # Ids and chat
    ok(
        "E-PROMPT-06", "ids", {"input": _IDS}, both(shaped(1, _TOKENS), equals(TEXT, prompt_name="")), server="prompted"
    ),
    *(
        ok("E-PROMPT-06", f"ids, {name!r}", {"input": _IDS, "prompt_name": name}, shaped(1, _TOKENS), server="prompted")
        for name in ("", "nothing")
    ),
    *(
        bad("E-PROMPT-06", f"{kind}, {field}", {**body, field: "query"}, "", field, server="prompted")
        for kind, body in {"ids": {"input": _IDS}, "chat": chat([said("queue")])}.items()
        for field in ("prompt_name", "input_type")
    ),
    ok(
        "E-PROMPT-06",
        "chat",
        chat([said("queue")]),
        equals("user queue ", prompt_name="", add_special_tokens=False),
        server="prompted",
    ),
    # Counted
    prompted(
        "E-PROMPT-07",
        "cut",
        {"prompt_name": "query", "truncate_prompt_tokens": 5},
        both(shaped(1, 5), equals(f"{PROMPTS['query']}the", prompt_name="")),
    ),
    ok("E-PROMPT-07", "the longest", {"input": "the " * (LENGTH - 4)}, shaped(1, LENGTH), server="prompted"),
    bad("E-PROMPT-07", "too long", {"input": "the " * (LENGTH - 3)}, "maximum context length", server="prompted"),
    ok(
        "E-PROMPT-07",
        "the longest without",
        {"input": "the " * (LENGTH - 2), "prompt_name": ""},
        shaped(1, LENGTH),
        server="prompted",
    ),
    # Left out of the pooling
    prompted(
        "E-PROMPT-08 E-PROMPT-07",
        "left out",
        {"prompt_name": "query"},
        both(shaped_as(HEAD_DIM, _TOKENS + 2), other_than(prompt_name="")),
        server="headed",
    ),
    bad("E-PROMPT-10", "in pieces", {"input": LONG, "prompt_name": "query"}, "pieces", "input_tokens", server="headed"),
    bad(
        "E-PROMPT-10",
        "cut on the left",
        a(prompt_name="query", truncate_prompt_tokens=5, truncation_side="left"),
        "",
        "truncation_side",
        server="headed",
    ),
    # What comes first
    Case("E-ORD-07", "model before prompt", a(model="gpt-9", prompt_name="poem"), server="prompted", status=404),
    bad("E-ORD-07", "prompt before length", {"input": LONG, "prompt_name": "poem"}, param="prompt_name"),
    bad("E-ORD-07", "task before the empty list", {"input": [], "task": "poem"}, param="task", server="tasked"),
    # Adapters
    *(prompted("E-TASK-01", task, {"task": task}, other_than(task=None), server="tasked") for task in TASKS),
    prompted("E-TASK-02", "the bare model", {}, as_task(None), server="tasked"),
    prompted("E-TASK-02", "null", {"task": None}, as_task(None), server="tasked"),
    prompted(
        "E-TASK-02", "for a word", {"input_type": "query"}, as_task(TASKS[0], prompt_name=TASKS[0]), server="tasked"
    ),
    prompted(
        "E-TASK-02", "by its name", {"input_type": TASKS[0]}, as_task(TASKS[0], prompt_name=TASKS[0]), server="tasked"
    ),
    prompted(
        "E-TASK-02 E-PROMPT-03",
        "by its name, without a prompt",
        {"input_type": TASKS[1]},
        both(shaped(1, _TOKENS), as_task(TASKS[1])),
        server="tasked",
    ),
    prompted(
        "E-TASK-02 E-TASK-01",
        "a task and a word",
        {"input_type": "query", "task": TASKS[1]},
        as_task(TASKS[1], prompt_name=TASKS[0]),
        server="tasked",
    ),
    *(
        refused(
            "E-TASK-03 E-REQ-22 E-ERR-13",
            f"task {task[:9]!r}",
            {"task": task},
            "task",
            r"`retrieval\.query`, `sorting`.*\(parameter=task",
            server="tasked",
        )
        for task in ("query", "", "x" * 100_000)
    ),
    get("E-TASK-03 E-MOD-02", "/v1/models", cards("tasked", tasks=[*TASKS], default_task=None), server="tasked"),
    pooled("E-TASK-04", "no adapter", in_pooling(), server="tasked", task="embed"),
    pooled(
        "E-TASK-04", "for a word", in_pooling(input_type="query"), server="tasked", task="embed", input_type="query"
    ),
    # What follows the pooling
    get(
        "E-POOL-04 E-MOD-02",
        "/v1/models",
        cards(
            "headed",
            dimension=HEAD_DIM,
            token_dimension=DIM,
            pooling="cls+mean",
            head=f"dense {2 * DIM}>{HEAD_DIM} tanh, layer norm",
            prompts=OTHER_PROMPTS,
            default_prompt=None,
        ),
        server="headed",
    ),
    get("E-MOD-02", "/v1/models", cards("prompted", prompts=PROMPTS, default_prompt="passage"), server="prompted"),
    ok("E-POOL-04", "bytes", {"input": [TEXT, "a"], "encoding_format": "bytes"}, packed, server="headed"),
    pooled("E-PTS-09", "token vectors", lambda reply, _: _dim(reply, DIM), server="headed", task="token_embed"),
    pooled(
        "E-PTS-09 E-PTS-04",
        "token vectors, bytes",
        token_matrices,
        server="headed",
        task="token_embed",
        input=[TEXT, "a"],
        encoding_format="bytes",
        embed_dtype="float16",
    ),
]
