"""What callers of the producer may give, brought into one form."""

from __future__ import annotations

from enum import StrEnum
from typing import TypedDict, TypeVar

import numpy as np

from embedstream.shared.errors import InvalidInput
from embedstream.shared.jobs import LongInputs, TruncationSide
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.recipe import NO_PROMPT, ROLE
from embedstream.shared.settings import LongInputsName

from .request import Inputs, Options

MAX_TIMEOUT_S = 30 * 86_400
"""A job's time to live is a 32-bit number of milliseconds."""
MAX_RESULT_TTL_S = 2**31

Choice = TypeVar("Choice", bound=StrEnum)


class RequestOptions(TypedDict, total=False):
    """What may be asked of any request, by keyword; what is left out is as it is said here.

    Args:
        normalize: scale to unit length; None does what the model does.
        dtype: number format of the result, also on the queue; float32 unless asked otherwise.
        truncate_prompt_tokens: cut inputs to this many tokens; -1 for the model's limit, None cuts none.
        truncation_side: `left` or `right`, the end of the finished sequence that loses tokens; None keeps the special
            tokens and cuts where the model's own tokenizer does.
        long_inputs: what becomes of inputs longer than the model reads, when none are to be cut: `error`, `truncate`,
            or `chunk` to embed them piece by piece; None for the setting.
        add_special_tokens: for texts: whether the tokenizer adds [CLS] and its like, which it does.
        lane: `interactive`, or `bulk` for work that can wait.
        timeout_s: seconds until nobody wants the result any more; None for the setting `request_timeout_s`.
        task: name of the model's adapter that computes the vectors; None for that of the `input_type`, or its default.
    """

    normalize: bool | None
    dtype: VectorType | str
    truncate_prompt_tokens: int | None
    truncation_side: str | None
    long_inputs: LongInputsName | str | None
    add_special_tokens: bool
    lane: Lane | str
    timeout_s: float | None
    task: str | None


class MapOptions(RequestOptions, total=False):
    """What may be asked of a map beside that; its requests go to the bulk lane unless told otherwise.

    Args:
        dimensions, prompt_name, input_type: as `Producer.embed` says.
        ordered: whether results come in the order of the items, which they do, or as they are done.
        most_items: that are read and not handed back yet; 16,384 unless told otherwise.
        patience_s: how long to wait while the queue is full or nobody answers, 300 unless told otherwise; then the
            error is raised.
    """

    dimensions: int | None
    prompt_name: str | None
    input_type: str | None
    ordered: bool
    most_items: int
    patience_s: float


def options_of(
    *,
    dimensions: int | None = None,
    normalize: bool | None = None,
    dtype: VectorType | str = VectorType.FLOAT32,
    per_token: bool = False,
    truncate_prompt_tokens: int | None = None,
    add_special_tokens: bool = True,
    lane: Lane | str = Lane.INTERACTIVE,
    timeout_s: float | None = None,
    truncation_side: str | None = None,
    long_inputs: LongInputsName | str = LongInputsName.ERROR,
    prompt_name: str | None = None,
    input_type: str | None = None,
    task: str | None = None,
) -> Options:
    """The options of a request, as `Producer.embed` and its like are told them.

    Raises:
        InvalidInput: there is no such choice, or the time is none a request can have.
    """
    if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:  # not a number fails the comparison too
        raise InvalidInput(
            f"timeout_s is {timeout_s}; it must be above 0 and at most {MAX_TIMEOUT_S}.", param="timeout_s"
        )
    vectors = VectorOptions(dimensions, normalize, _choice(VectorType, dtype, "dtype"), per_token)
    return Options(
        vectors,
        truncate_prompt_tokens,
        add_special_tokens,
        _choice(Lane, lane, "lane"),
        timeout_s,
        LongInputs[_choice(LongInputsName, long_inputs, "long_inputs").name],
        TruncationSide.MODEL if truncation_side is None else _side(truncation_side),
        prompt=_prompt(prompt_name, input_type),
        adapter=_name(task, "task") or "",
    )


def listed(inputs: str | Inputs) -> Inputs:
    """A single text is a list of one, and never a sequence of letters; what can only be iterated is gone through."""
    if isinstance(inputs, str):
        return [inputs]
    return inputs if isinstance(inputs, (list, tuple, np.ndarray)) else list(inputs)  # type: ignore[return-value] # same items


def _prompt(prompt_name: str | None, input_type: str | None) -> str:
    """What `Recipe.prompt_of` takes."""
    name, role = _name(prompt_name, "prompt_name"), _name(input_type, "input_type")
    if role is not None:
        if name is not None:
            raise InvalidInput("prompt_name and input_type both choose a prompt: give one of them.", param="input_type")
        return ROLE + role
    if name is not None and (name == NO_PROMPT or name.startswith(ROLE)):
        raise InvalidInput(f"No prompt is named {NO_PROMPT!r}, and none begins with {ROLE!r}.", param="prompt_name")
    return "" if name is None else name or NO_PROMPT


def _name(value: str | None, param: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{param} is {value!r}; a name is a text.", param=param)
    return value


def _side(value: str) -> TruncationSide:
    sides = {"left": TruncationSide.LEFT, "right": TruncationSide.RIGHT}
    if value not in sides:
        raise InvalidInput(f"truncation_side is {value!r}; choose from left, right.", param="truncation_side")
    return sides[value]


def _choice(kind: type[Choice], value: str, param: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise InvalidInput(f"{param} is {value!r}; choose from {', '.join(kind)}.", param=param) from None
