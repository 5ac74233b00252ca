"""The bodies of answers as models: what `/openapi.json` says of them.

Answers are printed from columns, never made of these objects; tests hold each answer against them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Vector = list[float] | str
"""Numbers, or base64 of the packed vector."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")  # what is not told here is not sent


class ErrorFields(_Answer):
    """What went wrong.

    Args:
        message: names the limit and the value met.
        type: of the error, as in the table of errors.
        param: the field or header to mend.
        code: the HTTP status.
    """

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(_Answer):
    """The body of every error.

    Args:
        error: what went wrong.
    """

    error: ErrorFields


class Usage(_Answer):
    """Tokens of all inputs after truncation, special tokens included.

    Args:
        prompt_tokens: the tokens.
        total_tokens: the same.
        completion_tokens: always 0.
        prompt_tokens_details: always null.
        completion_tokens_details: always null.
    """

    prompt_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    completion_tokens: Literal[0]
    prompt_tokens_details: None
    completion_tokens_details: None


class FailedItem(_Answer):
    """In place of a vector, for an input that failed by itself and with the header `x-on-error: partial`.

    Args:
        index: place of the input.
        object: always `error`.
        error: why.
    """

    index: int = Field(ge=0)
    object: Literal["error"]
    error: ErrorFields


class EmbeddingItem(_Answer):
    """The vector of an input.

    Args:
        index: place of the input.
        object: always `embedding`.
        embedding: numbers for the form `float`, base64 of the packed vector for `base64`.
    """

    index: int = Field(ge=0)
    object: Literal["embedding"]
    embedding: Vector


class PoolingItem(_Answer):
    """The vector of an input, or one for each of its tokens.

    Args:
        index: place of the input.
        object: always `pooling`.
        data: a vector, a list of vectors, or base64 of them packed row by row.
    """

    index: int = Field(ge=0)
    object: Literal["pooling"]
    data: Vector | list[list[float]]


class _List(_Answer):
    """What both lists share.

    Args:
        id: begins with `embd-` or `pooling-`; the rest is the request id.
        object: always `list`.
        created: Unix time in seconds.
        model: the first served name.
        usage: tokens.
    """

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class EmbeddingList(_List):
    """One item for each input, in the order of the inputs.

    Args:
        data: the items.
    """

    data: list[EmbeddingItem | FailedItem]


class PoolingList(_List):
    """One item for each input, in the order of the inputs.

    Args:
        data: the items.
    """

    data: list[PoolingItem | FailedItem]


class Card(_Answer):
    """A model under one of its names.

    Args:
        id: the name.
        object: always `model`.
        created: Unix time at which its first live consumer was ready.
        owned_by: always `embedstream`.
        root: the first served name.
        parent: always null.
        max_model_len: longest input in tokens.
        permission: always empty.
        dimension: components of a full vector.
        token_dimension: components of a token's vector, as `/pooling` gives them.
        pooling: hidden states to vector: `mean`, `cls`, `last`, `max`, `mean_sqrt_len`, `weighted_mean`, several joined
            by `+` whose vectors stand side by side, or `all` for one vector a token.
        pooling_source: where that was found, such as `modules.json`; null while no consumer is alive.
        head: what follows the pooling, such as `dense 768>256 tanh`; empty for nothing.
        normalize: whether vectors have unit length by default.
        matryoshka_dimensions: shorter sizes there are; `any` for all.
        similarity: how the model's authors compare its vectors: `cosine`, `dot`, `euclidean` or `manhattan`.
        prompts: texts that `prompt_name` has put before inputs, by name; the ends of long ones are left out.
        default_prompt: name of the one that texts get by default; null for none.
        tasks: adapters that `task` chooses from.
        default_task: the one without a choice; null for the bare model.
        dtype: number format of the forward pass; null while no consumer is alive.
        revision: of the weights.
        consumers: how many are alive.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["embedstream"]
    root: str
    parent: None
    max_model_len: int
    permission: list[str]
    dimension: int
    token_dimension: int
    pooling: str
    pooling_source: str | None
    head: str
    normalize: bool
    matryoshka_dimensions: list[int] | Literal["any"]
    similarity: str
    prompts: dict[str, str]
    default_prompt: str | None
    tasks: list[str]
    default_task: str | None
    dtype: str | None
    revision: str
    consumers: int


class Cards(_Answer):
    """All names.

    Args:
        object: always `list`.
        data: the cards; none before a consumer has announced its model.
    """

    object: Literal["list"]
    data: list[Card]


class Tokens(_Answer):
    """The tokens of a text.

    Args:
        count: how many.
        max_model_len: longest input of the model.
        tokens: their ids.
        token_strs: their entries in the vocabulary, where asked for.
    """

    count: int = Field(ge=0)
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Answer):
    """The text of tokens.

    Args:
        prompt: special tokens included.
    """

    prompt: str


class Health(_Answer):
    """A request would be answered now.

    Args:
        status: always `ok`.
        model: the first served name.
        consumers: how many are alive.
    """

    status: Literal["ok"]
    model: str
    consumers: int


class Fine(_Answer):
    """A probe's good answer.

    Args:
        status: always `ok`.
    """

    status: Literal["ok"]


class Version(_Answer):
    """The version of embedstream.

    Args:
        version: such as `0.1.0`.
    """

    version: str
