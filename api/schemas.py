"""The body of POST /v1/embeddings: read, checked and put in the producer's terms.

Pydantic checks the scalars, with its lax coercions ("8" is 8, 8.5 is an error). `input` is checked by hand: a union
of four list types would try 300,000 token ids one by one, several times.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from embedstream.producer import Options, VectorType
from embedstream.shared.errors import InvalidInput
from embedstream.shared.options import VectorOptions

from .errors import SchemaError

# Literals, not enums: pydantic then reports a wrong value as `literal_error`, the word that tests of clients look for.
EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]

Inputs = list[str] | list[list[int]]
"""All four forms of `input`, with a single text or sequence as a list of one."""

_NUMBERS = frozenset({int, float, bool})
_SHOWN_ERRORS = 10
_SHOWN_CHARS = 200


def _read_input(value: object) -> Inputs:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds <= {str}:
            return value  # also an empty list: the producer has the words for it
        if kinds <= _NUMBERS:
            return [_token_ids(value, kinds)]
        if kinds == {list}:
            inner = set(map(type, chain.from_iterable(value)))
            if inner <= _NUMBERS:
                return [_token_ids(ids, inner) for ids in value]
    raise PydanticCustomError(
        "input_type",
        "Input should be a text, a list of texts, a list of token ids or a list of lists of token ids, not a mixture",
    )


def _token_ids(numbers: list[Any], kinds: set[type]) -> list[int]:
    """JSON numbers as integers: 1.0 is 1, and booleans are left to count as 0 and 1."""
    if float not in kinds:
        return numbers
    if not all(math.isfinite(number) and number == int(number) for number in numbers):
        raise PydanticCustomError("int_from_float", "Token ids should be whole numbers, got one with a fraction")
    return [int(number) for number in numbers]


class EmbeddingRequest(BaseModel):
    """The fields of the body; a null counts as absent, and unknown fields are ignored.

    Args:
        input: texts, or token ids, which get no special tokens.
        model: a served name; "" is whatever is served.
        encoding_format: the form of the vectors in the response.
        dimensions: keep this many components; None keeps all.
        normalize: scale to unit length; None does what the model does.
        use_activation: another name of `normalize`.
        truncate_prompt_tokens: cut inputs to this many tokens; -1 for the model's limit, None refuses long ones.
        add_special_tokens: for texts: whether the tokenizer adds [CLS] and its like.
        embed_dtype: number format of the vectors, except in the form `float`.
        endianness: their byte order, except in the form `float`.
        user: without effect.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    input: Annotated[Inputs, PlainValidator(_read_input)]
    model: str = ""
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    add_special_tokens: bool = True
    embed_dtype: EmbedDtype = "float32"
    endianness: Endianness = "native"
    user: str | None = None

    def options(self, *, auto_truncate: bool) -> Options:
        """What the producer is to do.

        Args:
            auto_truncate: cut long inputs when the request does not say.
        """
        dtype = VectorType.FLOAT32 if self.encoding_format == "float" else VectorType(self.embed_dtype)
        normalize = self.use_activation if self.normalize is None else self.normalize
        truncate = self.truncate_prompt_tokens
        return Options(
            VectorOptions(self.dimensions, normalize, dtype),
            truncate_prompt_tokens=-1 if truncate is None and auto_truncate else truncate,
            add_special_tokens=self.add_special_tokens,
        )


def parse(content_type: str, body: bytes) -> EmbeddingRequest:
    """Read a request's body.

    Args:
        content_type: the header; parameters such as a charset are allowed.
        body: JSON.

    Raises:
        SchemaError: not JSON, or not of this form.
        InvalidInput: the form is right, but two fields contradict each other or ask for what is not offered.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise SchemaError("Unsupported Media Type: Only 'application/json' is allowed")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": (error.pos,), "msg": f"JSON decode error: {error.msg}", "input": {}}
        raise _schema_error([problem], "body") from None
    if not isinstance(data, dict):
        problem = {"type": "dict_type", "loc": (), "msg": "Input should be a valid dictionary", "input": data}
        raise _schema_error([problem], "body")
    given = {name: value for name, value in data.items() if value is not None}
    if "messages" in given and "input" not in given:
        raise InvalidInput("`input` is required: this server does not support chat `messages`.", param="messages")
    try:
        request = EmbeddingRequest.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        path = ".".join(map(str, ("body", *problems[0]["loc"])))
        raise _schema_error(problems, path) from None
    if None not in (request.normalize, request.use_activation) and request.normalize != request.use_activation:
        raise InvalidInput(
            f"`normalize` ({request.normalize}) and `use_activation` ({request.use_activation}) mean the same "
            "and must not differ.",
            param="normalize",
        )
    return request


def _schema_error(problems: Iterable[Mapping[str, Any]], param: str) -> SchemaError:
    """All problems in FastAPI's words, as clients of vLLM know them, cut to a readable size."""
    problems = list(problems)
    entries = [
        {**problem, "loc": ("body", *problem["loc"]), "input": _shorten(problem["input"])}
        for problem in problems[:_SHOWN_ERRORS]
    ]
    lines = "".join(f"\n  {entry}" for entry in entries)
    return SchemaError(f"{len(problems)} validation errors:{lines}", param=param)


def _shorten(value: object) -> object:
    """A value that is worth repeating to its sender; never the whole of a large one."""
    if isinstance(value, str):
        return value[:_SHOWN_CHARS]
    if isinstance(value, list | dict):
        return reprlib.repr(value)[:_SHOWN_CHARS]  # looks at the first few items only
    return value
