"""A trial of encoders: what they compute in batches, beside what the model computes for each sequence alone.

A wrong vector that gets past it is served. So it has a batch for each size at which linear layers differ, sequences of
several lengths, a padding token within one, and more tokens than the model has positions, where it has few.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .encoder import Encoder, Ids
from .linear import size_of
from .padded import Padded

_SHORT = (1, 3, 17, 60, 130)
"""Tokens of sequences beside those that are given: of one, and so many that batches of all sizes can be made."""
_MOST_TOKENS = 1100
"""Of all: enough to go beyond a table of 512 positions, and no more than a start can wait for."""

_COMPONENT = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_TOKEN = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}
"""How large each part of a difference may be: only the order of sums. All-MiniLM-L6-v2 packed differs by 9e-7, 0.0018
and 0.014 in a token, and by 0.14 and more with scores that are a tenth too large or tokens of other sequences seen."""
_LEAST_SPREAD = 0.01
"""Of the length of hidden states: tokens that are all alike, as unknown ones may be, are not held against it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much hidden states differ from the model's own.

    Args:
        component: the largest of one, relative to the largest value there is.
        token: the largest of a whole token, relative to how far tokens are from their mean. Where some components are
            large in all tokens, as in most models, these hide in the first what happens to the others.
    """

    component: float
    token: float

    def is_rounding(self, dtype: torch.dtype) -> bool:
        """Whether it may come from the order of sums alone."""
        return self.component <= _COMPONENT[dtype] and self.token <= _TOKEN[dtype]

    def __str__(self) -> str:
        return f"hidden states differ by {self.component:.1e} in a component, by {self.token:.1e} in a token"


class Trial:
    """Sequences, and what the model computes for each alone. Made and used in inference mode.

    Args:
        module: of transformers, in evaluation mode, on its device.
        ids: (total,) of sequences that differ in length; the longest should hold many different tokens.
        lengths: (n,) of each.
    """

    def __init__(self, module: torch.nn.Module, ids: Ids, lengths: Ids) -> None:
        padded = Padded(module)
        self.rows = _rows(module.config, ids, lengths)
        """Token ids of each sequence, those that were given first."""
        self._alone = [padded(row, np.array([len(row)])) for row in self.rows]
        self.given = torch.cat(self._alone[: len(lengths)])
        """(total, dim) hidden states of the sequences that were given, each computed alone."""
        together = torch.cat(self._alone).float()
        self._largest = together.abs().max()
        spread, size = (each.norm(dim=1).square().mean().sqrt() for each in (together - together.mean(0), together))
        self._spread = torch.maximum(spread, _LEAST_SPREAD * size)

    @property
    def batches(self) -> list[list[int]]:
        """Places of the rows of each: all of them, in no order of length; and of the short ones more and more."""
        shortest_first = sorted(range(len(self.rows)), key=lambda place: len(self.rows[place]))
        totals = accumulate(len(self.rows[place]) for place in shortest_first)
        of_size = {size_of(total): shortest_first[: number + 1] for number, total in enumerate(totals)}
        *smaller, _ = of_size.values()
        return [list(range(len(self.rows))), *smaller]

    def of(self, encoder: Encoder) -> Difference:
        """The largest differences of an encoder in any batch; infinite where a number is none.

        Raises:
            ValueError: it gives hidden states of another shape or number format.
            Exception: whatever it raises.
        """
        found = [self._in_batch(encoder, places) for places in self.batches]
        return Difference(max(each.component for each in found), max(each.token for each in found))

    def _in_batch(self, encoder: Encoder, places: list[int]) -> Difference:
        rows = [self.rows[place] for place in places]
        expected = torch.cat([self._alone[place] for place in places])
        hidden = encoder(np.concatenate(rows), np.array([len(row) for row in rows]))
        if hidden.shape != expected.shape or hidden.dtype != expected.dtype:
            raise ValueError(f"{hidden.dtype} {tuple(hidden.shape)} for {expected.dtype} {tuple(expected.shape)}")
        difference = hidden.float() - expected.float()
        component, token = difference.abs().max() / self._largest, difference.norm(dim=1).max() / self._spread
        return Difference(_number(component), _number(token))


def _number(value: Tensor) -> float:
    return torch.inf if torch.isnan(value) else float(value)


def _rows(config: Any, ids: Ids, lengths: Ids) -> list[Ids]:
    """The sequences that are given, and others made of the longest one, in no order of length."""
    rows = list(np.split(ids, np.cumsum(lengths)[:-1]))
    longest = max(rows, key=len)
    rows += [np.roll(longest, -length)[:length] for length in (*_SHORT, len(rows[0])) if length <= len(longest)]
    table, pad_id = (getattr(config, name, None) for name in ("max_position_embeddings", "pad_token_id"))
    if isinstance(table, int) and table + len(longest) <= _MOST_TOKENS:  # a larger one cannot be gone beyond
        while sum(map(len, rows)) <= table:
            rows.append(np.roll(longest, len(rows)))
    if isinstance(pad_id, int) and pad_id >= 0:
        rows[-1] = rows[-1].copy()
        rows[-1][len(rows[-1]) // 2] = pad_id
    return rows
