"""The recipe: what a model's files say about turning text into a vector."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import InvalidInput
from .jobs import TruncationSide


class Pooling(StrEnum):
    """How the hidden states of a sequence become its vector."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model makes vectors; the same for every side of the queue.

    Args:
        max_length: longest sequence in tokens, special tokens included.
        pooling: hidden states to vector; ALL gives one vector for each token.
        normalize: whether the model itself scales its vectors to unit length.
        dimension: components of a full vector.
        vocab_size: token ids are below this number.
        matryoshka_dims: shorter sizes a caller may ask for; None allows any, () none.
        truncation_side: the end the model's own tokenizer cuts (RIGHT or LEFT).
        do_lower_case: texts are lower-cased first; the card's tokenizer does it by itself.
        pooling_source: where `pooling` was found, for people: "modules.json", "override", …; not part of a card.
    """

    max_length: int
    pooling: Pooling
    normalize: bool
    dimension: int
    vocab_size: int
    matryoshka_dims: tuple[int, ...] | None = ()
    truncation_side: TruncationSide = TruncationSide.RIGHT
    do_lower_case: bool = False
    pooling_source: str = ""

    def check_dimensions(self, dimensions: int | None, model: str) -> None:
        """Refuse a vector size the model does not offer; its own full size is always offered.

        Raises:
            InvalidInput: naming the sizes there are.
        """
        if dimensions is None or dimensions == self.dimension:
            return
        if self.matryoshka_dims == ():
            raise InvalidInput(
                f"Model '{model}' does not support Matryoshka embeddings; dimensions must be unset or "
                f"{self.dimension} (received dimensions={dimensions}).",
                param="dimensions",
            )
        if not 1 <= dimensions <= self.dimension:
            raise InvalidInput(
                f"Model '{model}' only supports dimensions in range [1, {self.dimension}], got {dimensions}.",
                param="dimensions",
            )
        if self.matryoshka_dims is not None and dimensions not in self.matryoshka_dims:
            sizes = ", ".join(map(str, self.matryoshka_dims))
            raise InvalidInput(
                f"Model '{model}' only supports Matryoshka dimensions [{sizes}], got {dimensions}.",
                param="dimensions",
            )
