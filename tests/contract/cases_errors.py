"""Errors: their shape and their statuses."""

from __future__ import annotations

from .case import EMBEDDINGS, Case, bad, misfit, ok
from .cases_request import a
from .client import Api, Reply
from .models import FAIL

_WRONG = {
    **dict.fromkeys(("model", "user", "request_id", "cache_salt", "task"), 5),
    **dict.fromkeys(("dimensions", "truncate_prompt_tokens", "priority", "normalize", "use_activation"), "x"),
    **dict.fromkeys(("encoding_format", "embed_dtype", "endianness"), "x"),
}
_NOT_SERVED = ("score", "v1/score", "rerank", "v1/rerank", "v2/rerank", "v2/embed", "classify", "invocations", "load")


def ten_of_many(reply: Reply, api: Api) -> None:
    """So many are counted, and ten shown."""
    lines = reply.error["message"].splitlines()
    assert lines[0] == f"{len(_WRONG)} validation errors:"
    assert len(lines) == 11


def short_message(reply: Reply, api: Api) -> None:
    """Of a body with huge values the message shows little."""
    assert len(reply.error["message"]) < 6000
    assert "y" * 300 not in reply.error["message"]


def _lacks(reply: Reply, text: str) -> None:
    assert text.encode() not in reply.body


CASES: list[Case] = [
    # Their shape
    misfit("E-ERR-02", "one wrong field", a(dimensions="x"), "body.dimensions", r"^\d+ validation errors?:\n  \{"),
    misfit("E-ERR-02", "the first of several wrong fields", a(encoding_format="x", user=5), message="encoding_format"),
    misfit("E-ERR-02", "thirteen wrong fields", a(**_WRONG, messages=None), check=ten_of_many),
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
            *(("POST", f"/{path}") for path in _NOT_SERVED),
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
]
