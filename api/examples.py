"""Answers to show in the API's description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MODEL, _CREATED_S = "all-MiniLM-L6-v2", 1_761_000_000


def _listed(prefix: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """A list of one item."""
    usage = {
        "prompt_tokens": 5,
        "total_tokens": 5,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    head = {"id": f"{prefix}8c0f3b1d2e4a5f60", "object": "list", "created": _CREATED_S, "model": _MODEL}
    return {**head, "data": [{"index": 0, **item}], "usage": usage}


EMBEDDINGS = _listed("embd-", {"object": "embedding", "embedding": [-0.0345, 0.0305]})
POOLING = _listed("pooling-", {"object": "pooling", "data": [[-0.0345, 0.0305], [0.0121, -0.0078]]})
CARD: Mapping[str, Any] = {
    "id": _MODEL,
    "object": "model",
    "created": _CREATED_S,
    "owned_by": "embedstream",
    "root": _MODEL,
    "parent": None,
    "max_model_len": 256,
    "permission": [],
    "dimension": 384,
    "token_dimension": 384,
    "pooling": "mean",
    "pooling_source": "modules.json",
    "head": "",
    "normalize": True,
    "matryoshka_dimensions": [],
    "similarity": "cosine",
    "prompts": {},
    "default_prompt": None,
    "tasks": [],
    "default_task": None,
    "dtype": "bfloat16",
    "revision": "c9745ed1d9f2",
    "consumers": 1,
}
CARDS = {"object": "list", "data": [CARD]}
TOKENS = {
    "count": 5,
    "max_model_len": 256,
    "tokens": [101, 7592, 1010, 2088, 102],
    "token_strs": ["[CLS]", "hello", ",", "world", "[SEP]"],
}
