"""Models, probes, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .case import Case, Check, bad, each, misfit, ok
from .cases_inputs import said
from .cases_request import TEXT
from .client import Api, Reply
from .models import DIM, LENGTH

_IDS = [2, 85, 87, 3]


def is_json(expected: Any) -> Check:
    """The whole body."""

    def check(reply: Reply, api: Api) -> None:
        assert reply.json == expected

    return check


def has(**expected: Any) -> Check:
    """Some fields of the body."""

    def check(reply: Reply, api: Api) -> None:
        assert expected.items() <= reply.json.items(), reply.json

    return check


def cards(*names: str, **expected: Any) -> Check:
    """A card for each name, with these fields."""

    def check(reply: Reply, api: Api) -> None:
        assert set(reply.json) == {"object", "data"}
        assert reply.json["object"] == "list"
        assert [card["id"] for card in reply.json["data"]] == list(names)
        for card in reply.json["data"]:
            _card(card, **expected)

    return check


def _card(card: dict[str, Any], **expected: Any) -> None:
    assert set(card) == {
        *("id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"),
        *("dimension", "token_dimension", "pooling", "pooling_source", "head", "normalize", "matryoshka_dimensions"),
        *("similarity", "prompts", "default_prompt", "tasks", "default_task", "dtype", "revision", "consumers"),
    }
    assert card["object"] == "model"
    assert isinstance(card["created"], int)
    assert card["owned_by"] == "embedstream"
    assert card["parent"] is None
    assert card["permission"] == []
    assert card["consumers"] >= 1
    assert expected.items() <= card.items(), card


def one_card(name: str) -> Check:
    def check(reply: Reply, api: Api) -> None:
        _card(reply.json, id=name)

    return check


def get(rows: str, path: str, check: Check | None = None, **more: Any) -> Case:
    """A GET that is answered."""
    return ok(rows, f"GET {path}", None, check, method="GET", path=path, **more)


def tokenize(rows: str, name: str, check: Check | None = None, server: str = "tiny", **body: Any) -> Case:
    """A POST to /tokenize that is answered."""
    return ok(rows, f"tokenize {name}", body, check, path="/tokenize", server=server)


def as_text(text: str) -> Check:
    """The tokens of a text without specials."""

    def check(reply: Reply, api: Api) -> None:
        plain = api.post({"prompt": text, "add_special_tokens": False}, "/tokenize").json
        assert reply.json["tokens"] == plain["tokens"]
        assert reply.json["count"] == len(plain["tokens"])

    return check


def numbered(reply: Reply, api: Api) -> None:
    """A version."""
    assert list(reply.json) == ["version"]
    assert re.fullmatch(r"\d+\.\d+.*", reply.json["version"])


def same_vector(reply: Reply, api: Api) -> None:
    """The tokens as input make the vector of the text."""
    np.testing.assert_allclose(api.vectors([reply.json["tokens"]]), api.vectors(TEXT), atol=1e-5)


def _contains(reply: Reply, text: str) -> None:
    assert text.encode() in reply.body


CASES: list[Case] = [
    # Models
    get(
        "E-MOD-01 E-MOD-02 E-POOL-01",
        "/v1/models",
        cards(
            "tiny",
            "owner/tiny",
            max_model_len=LENGTH,
            dimension=DIM,
            token_dimension=DIM,
            pooling="mean",
            pooling_source="modules.json",
            head="",
            normalize=True,
            matryoshka_dimensions=[4, 8, 16],
            similarity="cosine",
            prompts={},
            default_prompt=None,
            tasks=[],
            default_task=None,
            root="tiny",
            dtype="float32",
        ),
    ),
    get(
        "E-MOD-02 E-POOL-01",
        "/v1/models",
        cards("raw", pooling="cls", normalize=False, matryoshka_dimensions=[]),
        server="raw",
    ),
    get("E-MOD-02 E-DIM-05", "/v1/models", cards("any", matryoshka_dimensions="any"), server="any"),
    get("E-MOD-02 E-POOL-01", "/v1/models", cards("all", pooling="all"), server="all"),
    get("E-MOD-01", "/v1/models", cards(), server="deserted"),
    get("E-MOD-03", "/v1/models/tiny", one_card("tiny")),
    get("E-MOD-03", "/v1/models/owner/tiny", one_card("owner/tiny")),
    get("E-MOD-03", "/v1/models/owner%2Ftiny", one_card("owner/tiny")),
    Case("E-MOD-03", "an unknown name", None, "GET", "/v1/models/gpt-9", status=404, message="`gpt-9` does not exist"),
    Case("E-MOD-03", "no name", None, "GET", "/v1/models/", status=404),
    # Probes
    *(get("E-MOD-04 E-MOD-06", path) for path in ("/health", "/livez", "/ready")),
    get("E-MOD-05", "/ping"),
    ok("E-MOD-05", "POST /ping", None, path="/ping"),
    ok("E-MOD-05", "POST /ping with a body", {"a": 1}, path="/ping"),
    *(
        Case(
            "E-MOD-04 E-MOD-05 E-MOD-06 E-ERR-08",
            f"no consumer {path}",
            None,
            "GET",
            path,
            server="deserted",
            status=503,
        )
        for path in ("/health", "/ping", "/ready")
    ),
    get("E-MOD-06", "/livez", server="deserted"),
    get("E-MOD-07", "/version", numbered),
    get(
        "E-MOD-08",
        "/metrics",
        lambda r, _: _contains(r, "embedstream_http_requests_total"),
        answers={"content-type": "text/plain.*"},
    ),
    # Tokenize
    tokenize(
        "E-TOK-01",
        "a text",
        is_json({"count": 4, "max_model_len": LENGTH, "tokens": _IDS, "token_strs": None}),
        prompt=TEXT,
    ),
    tokenize("E-TOK-01", "no text", has(count=2, tokens=[2, 3]), prompt=""),
    tokenize("E-TOK-01 E-REQ-04", "null model", has(count=4), prompt=TEXT, model=None),
    *(
        tokenize("E-TOK-01", f"model {name}", has(count=4), prompt=TEXT, model=name)
        for name in ("tiny", "owner/tiny", "")
    ),
    tokenize("E-TOK-02", "no specials", has(count=2, tokens=_IDS[1:3]), prompt=TEXT, add_special_tokens=False),
    tokenize(
        "E-TOK-03", "strings", has(token_strs=["[CLS]", "the", "queue", "[SEP]"]), prompt=TEXT, return_token_strs=True
    ),
    tokenize(
        "E-TOK-03",
        "strings of pieces",
        has(token_strs=["a", "##b"]),
        prompt="ab",
        return_token_strs=True,
        add_special_tokens=False,
    ),
    tokenize("E-TOK-03", "no strings", has(token_strs=None), prompt=TEXT, return_token_strs=False),
    tokenize("E-TOK-04", "a long text", has(count=100_002), prompt="the " * 100_000),
    Case(
        "E-TOK-05", "an unknown model", {"prompt": "a", "model": "gpt-9"}, path="/tokenize", status=404, param="model"
    ),
    Case(
        "E-TOK-05", "an unknown model", {"tokens": [5], "model": "gpt-9"}, path="/detokenize", status=404, param="model"
    ),
    tokenize("E-TOK-06", "messages", as_text("user queue queue"), server="any", messages=[said("queue")]),
    tokenize(
        "E-TOK-06",
        "messages, no prompt to answer",
        as_text("user queue "),
        server="any",
        messages=[said("queue")],
        add_generation_prompt=False,
    ),
    Case(
        "E-TOK-06",
        "messages without a template",
        {"messages": [said("a")]},
        path="/tokenize",
        status=400,
        message="chat template",
    ),
    ok("E-TOK-07", "detokenize", {"tokens": _IDS}, is_json({"prompt": "[CLS] the queue [SEP]"}), path="/detokenize"),
    ok("E-TOK-07", "detokenize pieces", {"tokens": [5, 46]}, is_json({"prompt": "ab"}), path="/detokenize"),
    ok("E-TOK-07", "detokenize nothing", {"tokens": []}, is_json({"prompt": ""}), path="/detokenize"),
    *(
        misfit("E-TOK-08", f"tokenize {body}", body, path="/tokenize")
        for body in each(
            {},
            {"prompt": 5},
            {"prompt": None},
            {"prompt": ["a"]},
            {"prompt": "a", "add_special_tokens": "x"},
            [],
            "a",
        )
    ),
    *(
        misfit("E-TOK-08", f"detokenize {body}", body, path="/detokenize")
        for body in each(
            {}, {"tokens": "a"}, {"tokens": [-1]}, {"tokens": [1.5]}, {"tokens": [[1]]}, {"tokens": None}, []
        )
    ),
    bad("E-TOK-08", "detokenize an unknown id", {"tokens": [5, 9999]}, "9999", path="/detokenize"),
    tokenize("E-TOK-09 E-INP-11", "and embed", same_vector, prompt=TEXT),
]
