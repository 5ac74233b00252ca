"""The device a consumer computes on, and how much of it."""

from __future__ import annotations

import torch

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.settings import Settings

_CPU_BATCH_TOKENS = 4096  # larger batches fall out of a CPU's cache
_CUDA_BATCH_TOKENS = 65_536


def choose_device(name: str | None) -> torch.device:
    """The device asked for, else CUDA where there is one, else the CPU.

    Raises:
        ModelLoadError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # only using it shows whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(f"the device {name!r} cannot be used: {reason}") from error
    return device


def batch_budget(settings: Settings, device: torch.device) -> int:
    """Highest cost of a micro-batch where nothing was measured: as asked for, else what suits the device, in tokens."""
    return settings.batch_tokens or (_CUDA_BATCH_TOKENS if device.type == "cuda" else _CPU_BATCH_TOKENS)
