"""What each path is for: the part of the API's description that no model or table holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from . import answer_models as answers
from . import examples
from .schemas import EmbeddingRequest, PoolingRequest
from .tokenize import DetokenizeRequest, TokenizeRequest

JSON, BYTES, TEXT = "application/json", "application/octet-stream", "text/plain"
_STRING = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A header or a part of the path that a request may have.

    Args:
        name: of it.
        description: what it does.
        schema: of its value.
        place: where it stands.
        example: a value.
    """

    name: str
    description: str
    schema: Mapping[str, Any]
    place: Literal["header", "path"] = "header"
    example: str | None = None

    def described(self) -> dict[str, Any]:
        """In OpenAPI's form."""
        fields = {"name": self.name, "in": self.place, "description": self.description, "schema": dict(self.schema)}
        example = {} if self.example is None else {"example": self.example}
        return fields | {"required": self.place == "path"} | example


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Args:
        method: of HTTP, in small letters.
        path: template.
        name: unique among all.
        tag: what it belongs to.
        summary: one line.
        description: the rest.
        answer: what a 200 is.
        answers: media type to model, of a 200; None where the body is not JSON.
        body: model of the request's body.
        examples: of the body, by name.
        parameters: beside the body.
        answer_headers: of a 200, beside `x-request-id`.
        errors: statuses beside those that every request may meet.
        example: of a 200 in JSON.
    """

    method: Literal["get", "post"]
    path: str
    name: str
    tag: str
    summary: str
    description: str
    answer: str
    answers: Mapping[str, type[BaseModel] | None]
    body: type[BaseModel] | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    example: Any = None


_ID = Parameter(
    "X-Request-Id", "Comes back in the answer; 1 to 128 visible ASCII characters.", _STRING, example="my-request-1"
)
_OF_VECTORS = (
    _ID,
    Parameter("x-request-timeout-ms", "Wait for at most so many milliseconds.", {"type": "integer", "minimum": 1}),
    Parameter("x-lane", "`bulk` for work that can wait.", {"enum": ["interactive", "bulk"]}),
    Parameter(
        "x-on-error",
        "`partial`: inputs that fail by themselves leave the others their vectors. Not for `bytes`.",
        {"enum": ["fail", "partial"]},
    ),
    Parameter("x-metadata", "`omit`: the form `bytes` without its header `metadata`.", {"enum": ["send", "omit"]}),
)
_VECTOR_ERRORS = (403, 404, 409, 429, 501, 504)
QUOTA_HEADERS = {
    "x-ratelimit-limit-tokens": "Of keys with a quota: how many tokens it holds.",
    "x-ratelimit-remaining-tokens": "Of keys with a quota: how many tokens are left.",
    "x-ratelimit-reset-tokens": "Of keys with a quota: time until it is full again.",
}
_VECTOR_HEADERS = {
    "x-truncated-inputs": "How many inputs lost tokens.",
    "x-queue-time-ms": "Longest wait in the queue.",
    "x-inference-time-ms": "Longest forward pass.",
    "x-total-time-ms": "From the first look at the request to its answer.",
    "x-compute-tokens": "Tokens that were computed.",
    "metadata": "Of the form `bytes`: JSON that says where each vector lies.",
    **QUOTA_HEADERS,
}
_HEALTH: tuple[tuple[Literal["get", "post"], str, str], ...] = (
    ("get", "/health", "health"),
    ("get", "/ping", "ping"),
    ("post", "/ping", "pingByPost"),
)
_PACKED = (
    "With `bytes` and `bytes_only` the answer is the packed vectors, one behind the other; the body of the request "
    "may be compressed (`Content-Encoding: gzip`, `zstd` or `deflate`)."
)

OPERATIONS = (
    Operation(
        "post",
        "/v1/embeddings",
        "createEmbedding",
        "vectors",
        "One vector for each input",
        f"As OpenAI's and vLLM's. A null counts as absent, and fields nobody knows are ignored. {_PACKED}",
        "The vectors, in the order of the inputs.",
        {JSON: answers.EmbeddingList, BYTES: None},
        EmbeddingRequest,
        {
            "texts": {"input": ["Hello, world", "Good morning"]},
            "base64": {"input": "Hello, world", "encoding_format": "base64"},
            "token ids": {
                "input": [[101, 7592, 102], [101, 2204, 2851, 102]],
                "encoding_format": "bytes_only",
                "embed_dtype": "float16",
            },
            "a query, with the model's prompt": {"input": "how do queues work?", "input_type": "query"},
            "a long text, cut": {
                "input": "A text that may be longer than the model reads",
                "truncate_prompt_tokens": -1,
            },
        },
        _OF_VECTORS,
        _VECTOR_HEADERS,
        _VECTOR_ERRORS,
        examples.EMBEDDINGS,
    ),
    Operation(
        "post",
        "/pooling",
        "createPooling",
        "vectors",
        "One vector for each input, or for each of its tokens",
        f"As vLLM's: `task` says which. {_PACKED}",
        "The vectors, in the order of the inputs.",
        {JSON: answers.PoolingList, BYTES: None},
        PoolingRequest,
        {"token vectors": {"input": "Hello, world", "task": "token_embed"}},
        _OF_VECTORS,
        _VECTOR_HEADERS,
        _VECTOR_ERRORS,
        examples.POOLING,
    ),
    Operation(
        "post",
        "/tokenize",
        "tokenize",
        "tokens",
        "The tokens of a text",
        "Of a text of up to 4,194,304 characters, also one longer than the model reads, or of one conversation.",
        "The tokens.",
        {JSON: answers.Tokens},
        TokenizeRequest,
        {"a text": {"prompt": "Hello, world", "return_token_strs": True}},
        (_ID,),
        errors=(404,),
        example=examples.TOKENS,
    ),
    Operation(
        "post",
        "/detokenize",
        "detokenize",
        "tokens",
        "The text of tokens",
        "Special tokens are shown.",
        "The text.",
        {JSON: answers.Text},
        DetokenizeRequest,
        {"tokens": {"tokens": [101, 7592, 1010, 2088, 102]}},
        (_ID,),
        errors=(404,),
        example={"prompt": "[CLS] hello, world [SEP]"},
    ),
    Operation(
        "get",
        "/v1/models",
        "listModels",
        "models",
        "The model, with a card for each of its names",
        "Limits, sizes, pooling, prompts, tasks, number format and revision.",
        "The cards.",
        {JSON: answers.Cards},
        parameters=(_ID,),
        example=examples.CARDS,
    ),
    Operation(
        "get",
        "/v1/models/{name}",
        "retrieveModel",
        "models",
        "The model under one of its names",
        "A name may hold slashes, as ids of the Hub do.",
        "The card.",
        {JSON: answers.Card},
        parameters=(Parameter("name", "A served name.", {"type": "string", "minLength": 1}, "path"), _ID),
        errors=(404,),
        example=examples.CARD,
    ),
    *(
        Operation(
            method,
            path,
            name,
            "probes",
            "Whether a request would be answered now",
            "A live consumer has the model loaded; if not, the answer is a 503 with the reason. Needs no key.",
            "It would.",
            {JSON: answers.Health},
            example={"status": "ok", "model": "all-MiniLM-L6-v2", "consumers": 1},
        )
        for method, path, name in _HEALTH
    ),
    Operation(
        "get",
        "/ready",
        "ready",
        "probes",
        "Whether requests should be sent here",
        "Redis answers, and a consumer lives or may be waited for. Needs no key.",
        "They should.",
        {JSON: answers.Fine},
        example={"status": "ok"},
    ),
    Operation(
        "get",
        "/livez",
        "live",
        "probes",
        "Whether the process lives",
        "Whatever the rest of the world does. Needs no key.",
        "It does.",
        {JSON: answers.Fine},
        example={"status": "ok"},
    ),
    Operation(
        "get",
        "/version",
        "version",
        "probes",
        "The version of embedstream",
        "Needs no key.",
        "The version.",
        {JSON: answers.Version},
        example={"version": "0.1.0"},
    ),
    Operation(
        "get",
        "/metrics",
        "metrics",
        "this server",
        "Metrics for Prometheus",
        "In its text format, or in OpenMetrics for those who ask for it with `Accept`.",
        "The metrics.",
        {TEXT: None, "application/openmetrics-text": None},
    ),
    Operation(
        "get",
        "/openapi.json",
        "openapi",
        "this server",
        "This description",
        "OpenAPI 3.1.",
        "The description.",
        {JSON: None},
    ),
    Operation(
        "get",
        "/docs",
        "docs",
        "this server",
        "This description for people",
        "A page that loads nothing from elsewhere.",
        "The page.",
        {"text/html": None},
    ),
)

REQUEST_BODIES = tuple(operation.body for operation in OPERATIONS if operation.body is not None)
"""The models of requests, each once."""
