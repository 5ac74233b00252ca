"""What an exception of a batch says: a bad input, too little memory, or a device that is lost.

It goes by names and words, not by classes of torch: the loop runs without it, and what CUDA reports comes as a plain
`RuntimeError` in older versions and in some libraries.
"""

from __future__ import annotations

from enum import Enum


class Fault(Enum):
    """Whose fault a failed batch is."""

    INPUT = "error"
    """Of a row, as far as anybody can tell: cutting the batch in two finds out which."""
    MEMORY = "out_of_memory"
    """Of the batch's size: its halves may fit."""
    DEVICE = "device"
    """Of the device: nothing will run in this process any more."""


_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "failed to allocate",
)
_DEVICE = (
    "cuda error",
    "hip error",
    "device-side assert",
    "illegal memory access",
    "launch failure",
    "cudnn_status_",
    "cublas_status_",
    "uncorrectable ecc",
    "driver shutting down",
)


class BrokenDevice(Exception):
    """The device's context is lost: this process can compute nothing any more."""


def fault_of(error: BaseException) -> Fault:
    """Sort an exception that a forward pass has raised."""
    if isinstance(error, BrokenDevice):
        return Fault.DEVICE
    names = {kind.__name__ for kind in type(error).__mro__}
    words = str(error).lower()
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return Fault.MEMORY
    if isinstance(error, RuntimeError):
        if any(word in words for word in _MEMORY):  # before the next: "CUDA error: out of memory"
            return Fault.MEMORY
        if "AcceleratorError" in names or any(word in words for word in _DEVICE):
            return Fault.DEVICE
    return Fault.INPUT
