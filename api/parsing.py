"""The bytes of a body to a JSON object, and what is wrong with it in the words clients of vLLM know."""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import orjson

from embedstream.shared.errors import InvalidInput

from .errors import SchemaError

_SHOWN_ERRORS = 10
_SHOWN_CHARS = 200
_SHOWN_ITEMS = 5
_SURROGATE = " surrogate in string"
"""How orjson calls half of a pair: the text would be no Unicode."""


def json_object(content_type: str, body: bytes, most_values: int | None = None) -> dict[str, Any]:
    """Read a body.

    Of a key that comes twice the last counts, and a byte order mark is left out, as Python's own parser does. What is
    no JSON (NaN, numbers beyond a double, half of a surrogate pair, more than 1,024 levels) is refused.

    Args:
        content_type: the header; parameters such as a charset are allowed.
        body: JSON in UTF-8.
        most_values: in it; a list or an object among others counts as two. None for any number.

    Returns:
        The object without its nulls: they mean "absent".

    Raises:
        SchemaError: not JSON, or no object.
        InvalidInput: it has more values than that.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise SchemaError("Unsupported Media Type: Only 'application/json' is allowed")
    if most_values is not None and _has_more_values(body, most_values):
        raise InvalidInput(
            f"The body has more than {most_values} values (--max-body-values), where a list or an object among others "
            "counts as two: send it in several."
        )
    try:
        data = orjson.loads(body.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        what = "lone surrogate: " if error.msg.endswith(_SURROGATE) else ""
        msg = f"JSON decode error: {what}{error.msg}"
        problem = {"type": "json_invalid", "loc": (error.pos,), "msg": msg}
        raise schema_error([problem], "body") from None
    if not isinstance(data, dict):
        problem = {"type": "dict_type", "loc": (), "msg": "Input should be a valid dictionary", "input": data}
        raise schema_error([problem], "body")
    return {name: value for name, value in data.items() if value is not None}


def _has_more_values(body: bytes, most: int) -> bool:
    """Whether JSON has more values than that, told without making one.

    Making them is what costs: 64 MB of empty lists keep the interpreter, and with it all other requests, for twenty
    seconds. A value has a comma before it, or is the first in its list or object, whose bracket counts for it.
    """
    if _openings(body) < most:  # those in texts included: enough to know for all but a few
        return False
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of its quotes begins and ends texts
    if bare.count(b'"') > 4 * most:  # two for a text, four for a key and a text
        return True
    return sum(map(_openings, bare.split(b'"')[::2])) > most


def _openings(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def schema_error(problems: Iterable[Mapping[str, Any]], param: str) -> SchemaError:
    """All problems in FastAPI's words, cut to a readable size.

    Args:
        problems: as pydantic lists them; without `input` where that says nothing.
        param: path to the first wrong place.
    """
    problems = list(problems)
    lines = "".join(f"\n  {_entry(problem)}" for problem in problems[:_SHOWN_ERRORS])
    return SchemaError(f"{len(problems)} validation errors:{lines}", param=param)


def _entry(problem: Mapping[str, Any]) -> dict[str, Any]:
    entry = {**problem, "loc": ("body", *problem["loc"])}
    return entry | {"input": _shorten(problem["input"])} if "input" in problem else entry


def refusal(message: str, param: str, value: object) -> InvalidInput:
    """What to raise for a field of the right form and a wrong value, in the words vLLM puts behind the message.

    Args:
        message: says what is legal.
        param: the field.
        value: what was given.
    """
    return InvalidInput(f"{message} (parameter={param}, value={_shorten(value)})", param=param)


def _shorten(value: object) -> object:
    """A value that is worth repeating to its sender; never the whole of a large one."""
    if isinstance(value, str):
        return value[:_SHOWN_CHARS]
    if isinstance(value, dict):
        value = dict(islice(value.items(), _SHOWN_ITEMS))  # reprlib would sort all of them
    if isinstance(value, list | dict):
        return reprlib.repr(value)[:_SHOWN_CHARS]  # looks at the first few items only
    return value
