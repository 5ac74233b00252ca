"""Sizes, and pooling."""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import ANY, Case, Check, bad, ok
from .cases_inputs import shaped
from .cases_request import TEXT, a, as_pooled, unit
from .client import Api, Reply
from .models import DIM

_WORDS = "the queue a b c d e f g h"
"""12 tokens with specials."""


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


def beginning(size: int, *, again: bool) -> Check:
    """The first components of the full vector, scaled to unit length again or as they are."""

    def check(reply: Reply, api: Api) -> None:
        full = api.vectors(TEXT, use_activation=False)[:, :size]
        expected = full / np.linalg.norm(full, axis=1, keepdims=True) if again else full
        np.testing.assert_allclose(reply.vectors, expected, rtol=1e-4, atol=1e-5)

    return check


CASES: list[Case] = [
    # Sizes
    *(
        ok("E-DIM-01", f"full size, {server}", a(dimensions=DIM), shaped(1), server=server)
        for server in ("tiny", "raw", "any")
    ),
    *(
        bad(
            "E-DIM-02 E-DIM-08",
            f"size {size}",
            a(dimensions=size),
            "does not support Matryoshka",
            "dimensions",
            server="raw",
        )
        for size in (8, 31, 1, 33, 0, -1)
    ),
    *(
        bad("E-DIM-03 E-DIM-08", f"size {size} of {server}", a(dimensions=size), "range", "dimensions", server=server)
        for size in (0, -1, 33, 2**31, 10**9)
        for server in ("tiny", "any")
    ),
    *(
        bad(
            "E-DIM-04 E-DIM-08",
            f"size {size}",
            a(dimensions=size),
            rf"only supports Matryoshka dimensions \[.*\], got {size}",
            "dimensions",
        )
        for size in (1, 5, 31)
    ),
    *(ok("E-DIM-04 E-DIM-06", f"size {size}", a(dimensions=size), beginning(size, again=True)) for size in (4, 8, 16)),
    *(
        ok("E-DIM-05 E-DIM-06", f"any size: {size}", a(dimensions=size), beginning(size, again=True), server="any")
        for size in (1, 5, 31)
    ),
    ok("E-DIM-06", "unit length", a(dimensions=8), unit),
    ok("E-DIM-07", "not normalised", a(dimensions=8, use_activation=False), beginning(8, again=False)),
    ok("E-DIM-07", "not normalised, any", a(dimensions=5, normalize=False), beginning(5, again=False), server="any"),
    # Pooling
    ok("E-POOL-01", "cls", a(), as_pooled, server="raw"),
    *(
        Case(
            "E-POOL-03",
            f"pooling all: {name}",
            body,
            server="all",
            status=501,
            type="NotImplementedError",
            param=ANY,
            message="/pooling",
        )
        for name, body in {"a text": a(), "ids": {"input": [5]}, "bytes": a(encoding_format="bytes")}.items()
    ),
]
