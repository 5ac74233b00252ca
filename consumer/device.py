"""The device a consumer computes on, and the number format that suits it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.settings import Dtype, Settings

_CPU_BATCH_TOKENS = 4096  # larger batches fall out of a CPU's cache
_CUDA_BATCH_TOKENS = 65_536
_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16}
_FLOAT32_ALONE = {
    "deberta": "parts of whose attention transformers computes in float32",  # and fails in other formats
    "mobilebert": "whose values are not normalised",
}
_LARGE_VALUES = frozenset(("embedding_gemma2", "embedding_gemma2_text", "gemma2", "gemma3", "gemma3_text"))


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


def choose_dtype(wanted: Dtype, device: torch.device, config: Mapping[str, Any]) -> tuple[torch.dtype, str]:
    """The number format of the forward pass, and for people the reason why.

    Args:
        wanted: by the operator.
        device: that computes.
        config: what the model's `config.json` holds.
    """
    if wanted is not Dtype.AUTO:
        return _DTYPES[wanted], "asked for"
    kind = str(config.get("model_type"))
    if kind in _FLOAT32_ALONE:
        return torch.float32, f"{kind}, {_FLOAT32_ALONE[kind]}"
    if device.type == "cuda":
        return _choose_on_cuda(config)
    if device.type == "cpu":
        feature = bfloat16_feature()
        return (torch.bfloat16, f"CPU with {feature}") if feature else (torch.float32, "CPU without AMX or AVX512-BF16")
    return torch.float32, f"{device.type} device"


def _choose_on_cuda(config: Mapping[str, Any]) -> tuple[torch.dtype, str]:
    """Float16, which is the finer one, but for models that may outgrow it: its largest number is 65504."""
    kind = str(config.get("model_type"))
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    written = {part.get(key) for part in parts for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)}
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if kind in _LARGE_VALUES:
        reason = f"CUDA device, and the values of {kind} outgrow float16"
        return (torch.bfloat16 if has_bfloat16 else torch.float32), reason
    if "bfloat16" in written and has_bfloat16:
        return torch.bfloat16, "CUDA device, and a model made in bfloat16"
    return torch.float16, "CUDA device"


def bfloat16_feature() -> str | None:
    """The CPU's instructions for bfloat16, or None: without them bfloat16 is slower than float32.

    torch's helpers are private and differ between versions; one that is missing counts as "no".
    """
    for name, feature in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
        helper = getattr(torch.cpu, name, None)
        if helper is not None and helper():
            return feature
    return None


def thread_count(settings: Settings) -> int:
    """CPU threads of one forward pass: as asked for, else this consumer's share of the cores."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    return settings.threads or max(1, cores // max(1, settings.consumers))


def batch_budget(settings: Settings, device: torch.device) -> int:
    """Most tokens of a micro-batch, padding included: as asked for, else what suits the device."""
    return settings.batch_tokens or (_CUDA_BATCH_TOKENS if device.type == "cuda" else _CPU_BATCH_TOKENS)
