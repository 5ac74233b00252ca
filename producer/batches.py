"""Batches: items of a map that share a request, and what is told of those that have no vector."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import EmbedstreamError, InvalidInput

from .failures import InputFailure
from .request import BYTES_A_TOKEN

T = TypeVar("T")
Input: TypeAlias = "str | Sequence[int] | NDArray[np.integer]"
"""A text, or token ids."""
Vector: TypeAlias = "NDArray[Any] | InputFailure"
"""(dim,) of the number format asked for; or why there is none."""


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """An item that was read and not sent.

    Args:
        item: the caller's.
        given: what is to be embedded.
        tokens: about so many; 0 for what cannot be embedded.
    """

    item: T
    given: Input
    tokens: int

    @property
    def kind(self) -> type[object] | None:
        """Texts and token ids do not share a request; None for what is neither and goes with both."""
        if not self.tokens:
            return None
        return str if isinstance(self.given, str) else np.ndarray


@dataclass(slots=True)
class Batch(Generic[T]):
    """Items that follow one another in the source and share a request.

    Args:
        first: place of the first item in the source.
        entries: the items.
        vectors: one for each, when it is answered.
        error: why the request has failed as a whole.
    """

    first: int
    entries: list[Waiting[T]]
    vectors: Sequence[Vector] = ()
    error: EmbedstreamError | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> int:
        """Of all items, about."""
        return sum(entry.tokens for entry in self.entries)

    @property
    def pairs(self) -> list[tuple[T, Vector]]:
        """The items with their vectors."""
        return [(entry.item, vector) for entry, vector in zip(self.entries, self.vectors, strict=True)]


def tokens_about(given: Any) -> int:
    """About so many tokens, at least one; 0 for what is neither a text nor a sequence."""
    if isinstance(given, str):
        return 1 + len(given) // BYTES_A_TOKEN
    return max(1, len(given)) if isinstance(given, (list, tuple)) or _is_row(given) else 0


def _is_row(given: Any) -> bool:
    return isinstance(given, np.ndarray) and given.ndim > 0


def misfit(place: int, given: Any) -> InputFailure:
    """Why an item is nothing that could be embedded."""
    return InputFailure.of(
        InvalidInput(
            f"Inputs are texts or sequences of token ids; the input at index {place} is a {type(given).__name__}.",
            param="input",
        )
    )


def renumbered(failure: InputFailure, number: int, place: int) -> InputFailure:
    """A failure that tells an item's place in the source, where it told that in its request."""
    message = re.sub(rf"(?<=input at index ){number}\b", str(place), failure.message)
    refusal = failure.refusal
    if refusal is not None:
        refusal = type(refusal)(message, param=refusal.param)
    return replace(failure, message=message, refusal=refusal)
