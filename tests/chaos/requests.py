"""What the clients ask for: sizes, texts or token ids, and the answer each must get."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from . import toy

_ROW = (4, 20)  # tokens of an input


class Form(Enum):
    """How the inputs and the vectors travel."""

    IDS_AND_BYTES = 1
    IDS_AND_FLOATS = 2
    TEXTS_AND_BYTES = 3


@dataclass(frozen=True)
class Asked:
    """A request with what is known of it beforehand.

    Args:
        number: of the request within its deployment; each input carries it.
        inputs: token ids of each input.
        form: how they travel.
        poisoned: whether an input is meant to fail.
    """

    number: int
    inputs: tuple[tuple[int, ...], ...]
    form: Form
    poisoned: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(map(len, self.inputs))

    def body(self) -> bytes:
        """The HTTP body."""
        texts = self.form is Form.TEXTS_AND_BYTES
        inputs = [" ".join(map(str, row)) for row in self.inputs] if texts else self.inputs
        packed = "float" if self.form is Form.IDS_AND_FLOATS else "bytes_only"
        return json.dumps({"model": toy.MODEL, "input": inputs, "encoding_format": packed}).encode()

    def is_answered_by(self, body: bytes) -> bool:
        """Whether a response holds exactly the vectors of these inputs, in their order."""
        right = toy.expected(self.inputs)
        if self.form is not Form.IDS_AND_FLOATS:
            return body == right.astype("<f4").tobytes()
        data = json.loads(body)["data"]
        in_order = [item["index"] for item in data] == list(range(len(self.inputs)))
        return in_order and np.array_equal(np.array([item["embedding"] for item in data]), right)


class Mixture:
    """Makes requests: mostly small, some of many inputs, a few of several jobs.

    Args:
        seed: the same seed gives the same requests.
        largest: most inputs of a request.
        will: a token id that some inputs carry.
        share: of the inputs that carry it.
    """

    def __init__(self, seed: int, *, largest: int = 100, will: int = 0, share: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._largest = largest
        self._will = will
        self._share = share
        self._next = 0

    def one(self, n_inputs: int = 0, wills: Sequence[int] = ()) -> Asked:
        """The next request.

        Args:
            n_inputs: how many inputs; 0 for what comes.
            wills: token ids with a will, for as many of its inputs.
        """
        self._next += 1
        chosen = self._random
        n_inputs = n_inputs or min(
            self._largest, chosen.choices((1, chosen.randint(2, 16), chosen.randint(65, 100)), (70, 26, 4))[0]
        )
        rows, poisoned = [], bool(wills)
        for row in range(n_inputs):
            body = [chosen.randint(toy.FIRST, toy.VOCABULARY - 1) for _ in range(chosen.randint(*_ROW))]
            if row < len(wills):
                body.append(wills[row])
            elif self._share and chosen.random() < self._share:
                body.append(self._will)
                poisoned = True
            rows.append(toy.tagged(self._next, row, body))
        return Asked(self._next, tuple(rows), chosen.choice(list(Form)), poisoned)
