"""Rows and inputs: a request's inputs travel as rows, none, one or several for each, and come back as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from embedstream.shared.chunks import travelling
from embedstream.shared.errors import MalformedResult
from embedstream.shared.options import VectorOptions, VectorType


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How the rows of a request's jobs make up its inputs.

    Args:
        counts: (inputs,) uint32 rows of each; 0 for an input that was refused before the queue.
        options: what the caller asked of its vectors.
        normalize: whether the mean of several rows is scaled to unit length.
    """

    counts: NDArray[np.uint32]
    options: VectorOptions
    normalize: bool = False

    @property
    def n_rows(self) -> int:
        """Rows of the whole request."""
        return int(self.counts.sum(dtype=np.int64))

    @property
    def is_plain(self) -> bool:
        """Whether each input is one row."""
        return bool((self.counts == 1).all())

    @property
    def travelling(self) -> VectorOptions:
        """What the jobs ask of their vectors."""
        return travelling(self.options) if (self.counts > 1).any() else self.options

    def encode(self) -> bytes:
        """JSON, for whoever picks the result up."""
        return orjson.dumps(
            {
                "rows": self.counts.tolist(),
                "dtype": self.options.dtype,
                "per_token": self.options.per_token,
                "normalize": self.normalize,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> RowPlan:
        """From JSON.

        Raises:
            MalformedResult: not a plan.
        """
        try:
            fields: dict[str, Any] = orjson.loads(data)
            options = VectorOptions(dtype=VectorType(fields["dtype"]), per_token=bool(fields["per_token"]))
            return cls(np.array(fields["rows"], np.uint32), options, bool(fields["normalize"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MalformedResult(f"what is said of the rows of a kept result is damaged: {error!r}") from error
