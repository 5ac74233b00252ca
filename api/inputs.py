"""The forms of `input` and `messages`, checked by hand.

A union of pydantic's list types would try 300,000 token ids one by one, several times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic_core import PydanticCustomError

Inputs = list[str] | list[list[int]] | list[NDArray[np.integer]]
"""All four forms of `input`, with a single text or sequence as a list of one; very many token ids are arrays."""

Conversation = list[dict[str, Any]]
"""Messages, each with its `role` and its `content`, in the order they were said."""

_NUMBERS = frozenset({int, float, bool})
_COLUMN_IDS = 20_000
_ROW_IDS = 16


@dataclass(frozen=True, slots=True)
class Conversations:
    """Chat messages in their two forms, with a single conversation as a list of one; each becomes one prompt.

    Args:
        each: the conversations.
        param: the field they came in.
    """

    each: list[Conversation]
    param: str

    def __len__(self) -> int:
        return len(self.each)


def is_chat(value: object) -> bool:
    """Whether a value begins like chat messages, or like a batch of conversations."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) or (isinstance(first, list) and bool(first) and isinstance(first[0], dict))


def read_input(value: object) -> Inputs | Conversations:
    """The value of `input`.

    Raises:
        PydanticCustomError: it has none of the forms.
    """
    if isinstance(value, str):
        return [value]
    if is_chat(value):
        return _conversations(value, "input")
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds <= {str}:
            return value  # also an empty list: the producer has the words for it
        if kinds <= _NUMBERS:
            return _columns([_token_ids(value, kinds)])
        if kinds == {list}:
            inner = set(map(type, chain.from_iterable(value)))
            if inner <= _NUMBERS:
                return _columns(value if inner <= {int} else [_token_ids(ids, inner) for ids in value])
    raise PydanticCustomError(
        "input_type",
        "Input should be a text, a list of texts, a list of token ids, a list of lists of token ids, or chat messages, "
        "not a mixture",
    )


def read_messages(value: object) -> Conversations:
    """The value of `messages`.

    Raises:
        PydanticCustomError: neither a conversation nor a list of them.
    """
    if value == [] or is_chat(value):
        return _conversations(value, "messages")
    raise PydanticCustomError(
        "messages_type", "Input should be a list of messages with a role and a content, or a list of such lists"
    )


def read_ids(values: list[Any]) -> list[int]:
    """A list of token ids.

    Raises:
        PydanticCustomError: not all of it are whole numbers.
    """
    kinds = set(map(type, values))
    if not kinds <= _NUMBERS:
        raise PydanticCustomError("int_type", "Input should be a list of valid integers")
    return _token_ids(values, kinds)


def read_objects(value: object) -> dict[str, dict[str, Any]]:
    """An object of objects; the first wrong one is enough to tell, where pydantic would list a hundred thousand.

    Raises:
        PydanticCustomError: it is none.
    """
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise PydanticCustomError("dict_type", "Input should be a dictionary of dictionaries")
    return value


def _token_ids(numbers: list[Any], kinds: set[type]) -> list[int]:
    """JSON numbers as integers: 1.0 is 1, and booleans count as 0 and 1."""
    if kinds <= {int}:
        return numbers
    whole = list(map(int, numbers))  # JSON has no infinity; list by list and in C, for there may be many short ones
    if whole != numbers:
        raise PydanticCustomError("int_from_float", "Token ids should be whole numbers, got one with a fraction")
    return whole


def _columns(rows: list[list[int]]) -> Inputs:
    """Very many token ids as arrays: 300,000 numbers take 3 ms to be freed alone, and that on the event loop."""
    total = sum(map(len, rows))
    if total < max(_COLUMN_IDS, _ROW_IDS * len(rows)):
        return rows
    try:
        return [np.array(row) for row in rows]
    except OverflowError:  # beyond 64 bits: the producer has the words for it
        return rows


def _conversations(value: Any, param: str) -> Conversations:
    batch = bool(value) and isinstance(value[0], list)
    each = value if batch else [value] if value else []
    for index, conversation in enumerate(each):
        if not isinstance(conversation, list):
            _refuse(index, None, "should be a list of messages", batch=batch)
        _check_messages(index, conversation, batch=batch)
    return Conversations(each, param)


def _check_messages(index: int, messages: Iterable[object], *, batch: bool) -> None:
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            _refuse(index, place, "should be an object with a role and a content", batch=batch)
        if not isinstance(message.get("role"), str):
            _refuse(index, place, "should have a role that is a string", batch=batch)
        content = message.get("content")
        if not (content is None or isinstance(content, str)) and not (
            isinstance(content, list) and all(isinstance(part, str | dict) for part in content)
        ):
            _refuse(index, place, "should have a content that is a string or a list of parts", batch=batch)


def _refuse(index: int, place: int | None, what: str, *, batch: bool) -> NoReturn:
    parts = [f"conversation {index}"] if batch else []
    if place is not None:
        parts.insert(0, f"message {place}")
    where = " of ".join(parts)
    raise PydanticCustomError("message_type", "{where} {what}", {"where": where[0].upper() + where[1:], "what": what})
