"""A way round for batches that an encoder fails at and the model itself does not.

At load an encoder is tried with a few sequences. Traffic may hold what those did not, and the code of a model may then
do something that cannot be done to a packed batch. Without a way round every such batch would fail, however often it
was halved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedstream.consumer.faults import Fault, fault_of
from embedstream.shared.logs import frames_of, get_logger

from .encoder import Encoder, Ids
from .padded import EqualLengths, Padded

log = get_logger()


class Guarded:
    """Runs an encoder and, for a batch that it fails at, the model.

    Args:
        encoder: that was chosen.
        module: of transformers, that it computes.
    """

    def __init__(self, encoder: Encoder, module: torch.nn.Module) -> None:
        self._encoder = encoder
        # A batch that was put together for an encoder without padding may be many times as large with it.
        self._otherwise = EqualLengths(Padded(module))

    @property
    def name(self) -> str:
        """See `Encoder`."""
        return self._encoder.name

    @property
    def fills_up(self) -> bool:
        """See `Encoder`."""
        return self._encoder.fills_up

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """See `Encoder`.

        Raises:
            Exception: the model fails as well, or it is for want of memory, or the device is lost.
        """
        try:
            return self._encoder(ids, lengths)
        except Exception as error:
            if fault_of(error) is not Fault.INPUT:
                raise
            kind, frames = type(error).__name__, frames_of(error)  # the traceback holds the tensors of the batch
        hidden = self._otherwise(ids, lengths)
        log.warning("encoder.failed", encoder=self.name, rows=len(lengths), tokens=len(ids), error=kind, frames=frames)
        return hidden


def guarded(encoder: Encoder, module: torch.nn.Module) -> Encoder:
    """An encoder with a way round, unless it runs nothing but the model.

    Args:
        encoder: that was chosen.
        module: of transformers, that it computes.
    """
    return encoder if isinstance(encoder, (Padded, EqualLengths)) else Guarded(encoder, module)
