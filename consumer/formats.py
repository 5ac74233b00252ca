"""The number formats a model may be computed in on a device, the best first, and the precision of float32 itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Dtype, Float32Precision

from .measured import Measurements

log = get_logger()

_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16}
_FLOAT32_ALONE = {
    "deberta": "parts of whose attention transformers computes in float32",  # and fails in other formats
    "mobilebert": "whose values are not normalised",
}
_LARGE_VALUES = frozenset(("embedding_gemma2", "embedding_gemma2_text", "gemma2", "gemma3", "gemma3_text"))
_BFLOAT16_FEATURES = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16"))
_OLDER_HELPERS = (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16"))
_TENSOR_CORES = (7, 0)
"""Compute capability of the first CUDA devices that multiply halves faster than float32."""
_WORTH = 1.15
"""By how much a layer must be faster: below that float32 is the better choice, for it is exact."""
_GAIN = "bfloat16-gain"
_ROUNDS = 4  # the first meets cold caches
_SEQUENCES, _TOKENS, _HEADS, _HIDDEN = 2, 128, 12, 384  # of a layer of all-MiniLM-L6-v2: larger ones gain more


@dataclass(frozen=True, slots=True)
class Format:
    """A number format of weights and forward pass.

    Args:
        dtype: of torch.
        reason: why it is chosen, for people.
    """

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """Such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


def formats(
    wanted: Dtype, device: torch.device, config: Mapping[str, Any], measured: Measurements
) -> tuple[Format, ...]:
    """Number formats for a model, the best first: one is taken if the model's vectors in it are good enough.

    Args:
        wanted: by the operator.
        device: that computes; of a CPU the number of threads must be set.
        config: what the model's `config.json` holds.
        measured: where a timing of an earlier start may be.

    Returns:
        The one asked for; else at most two half formats, and float32 in the end.
    """
    if wanted is not Dtype.AUTO:
        return (Format(_DTYPES[wanted], "asked for"),)
    kind = str(config.get("model_type"))
    if kind in _FLOAT32_ALONE:
        return (Format(torch.float32, f"{kind}, {_FLOAT32_ALONE[kind]}"),)
    if device.type == "cuda":
        return _on_cuda(config, device)
    if device.type == "cpu":
        return _on_cpu(measured)
    return (Format(torch.float32, f"{device.type} device"),)


def _on_cuda(config: Mapping[str, Any], device: torch.device) -> tuple[Format, ...]:
    """Float16, which is the finer one, but for models that may outgrow it: its largest number is 65504."""
    exact = Format(torch.float32, "CUDA device")
    if torch.cuda.get_device_capability(device) < _TENSOR_CORES:
        return (Format(torch.float32, "CUDA device without tensor cores"),)
    kind = str(config.get("model_type"))
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    written = {part.get(key) for part in parts for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)}
    wide = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if kind in _LARGE_VALUES:
        reason = f"CUDA device, and the values of {kind} outgrow float16"
        return (Format(wide, reason), exact) if wide else (Format(torch.float32, reason),)
    if "bfloat16" in written and wide:
        return Format(wide, "CUDA device, and a model made in bfloat16"), exact
    fine = Format(torch.float16, "CUDA device")
    return (fine, Format(wide, "CUDA device"), exact) if wide else (fine, exact)


def _on_cpu(measured: Measurements) -> tuple[Format, ...]:
    """Bfloat16 where it is faster, not where a CPU only says so: a virtual machine may withhold the instructions.

    Float16 is left to those who ask for it: torch computes it slowly but on CPUs with AMX-FP16, where it may or may
    not be faster than bfloat16, and machines of one fleet should not differ by a hair's breadth of time.
    """
    feature = bfloat16_feature()
    if feature is None:
        return (Format(torch.float32, "CPU without instructions for bfloat16"),)
    gain = measured.get(_GAIN)
    if not isinstance(gain, float):
        gain = round(bfloat16_gain(), 2)
        measured.put(_GAIN, gain)
    if gain < _WORTH:
        reason = f"CPU with {feature}, on which a layer in bfloat16 is {gain:.1f} times as fast as in float32"
        return (Format(torch.float32, reason),)
    reason = f"CPU with {feature}, {gain:.1f} times as fast as float32"
    return Format(torch.bfloat16, reason), Format(torch.float32, f"CPU with {feature}")


def bfloat16_feature() -> str | None:
    """The CPU's instructions for bfloat16, or None: without them bfloat16 is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        has = capabilities()
        return next((feature for name, feature in _BFLOAT16_FEATURES if has.get(name)), None)
    # Some versions of torch have only private helpers, and not the same ones; one that is missing counts as "no".
    helpers = ((getattr(torch.cpu, name, None), feature) for name, feature in _OLDER_HELPERS)
    return next((feature for helper, feature in helpers if helper is not None and helper()), None)


def bfloat16_gain() -> float:
    """How many times as fast the CPU computes a small transformer layer in bfloat16 as in float32."""
    layers = {dtype: _layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
    fastest = dict.fromkeys(layers, float("inf"))
    with torch.inference_mode():
        for _ in range(_ROUNDS):  # in turns, so that what else the machine does hits both
            for dtype, run in layers.items():
                started_s = time.perf_counter()
                run()
                fastest[dtype] = min(fastest[dtype], time.perf_counter() - started_s)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def _layer(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A layer of BERT on a few sequences: products alone would promise more than a model keeps."""
    of_head = _HIDDEN // _HEADS
    given = torch.full((_SEQUENCES * _TOKENS, _HIDDEN), 0.5, dtype=dtype)
    weights = [
        torch.full(shape, 0.01, dtype=dtype)
        for shape in ((3 * _HIDDEN, _HIDDEN), (_HIDDEN, _HIDDEN), (4 * _HIDDEN, _HIDDEN), (_HIDDEN, 4 * _HIDDEN))
    ]

    def run() -> torch.Tensor:
        qkv = linear(given, weights[0]).view(_SEQUENCES, _TOKENS, 3, _HEADS, of_head).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(given.shape)
        hidden = layer_norm(given + linear(attended, weights[1]), (_HIDDEN,))
        return layer_norm(hidden + linear(gelu(linear(hidden, weights[2])), weights[3]), (_HIDDEN,))

    return run


def set_float32_precision(precision: Float32Precision) -> None:
    """Say how float32 is multiplied, whatever torch's defaults and the environment say.

    Args:
        precision: `ieee` for float32 throughout; `tf32` lets CUDA's tensor cores round factors to 10 bits.

    Through torch's older switches: they keep what reads the newer ones right, while after a change of
    `fp32_precision` torch.compile and flex attention of torch 2.9 to 2.13 fail when they read the older ones.
    """
    exact = precision is Float32Precision.IEEE
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact  # its default is to round
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        mode = os.environ.get(name, "strict").lower()
        if exact and mode != "strict":  # read by oneDNN itself, and nothing can take it back here
            log.warning("model.float32_rounded", variable=name, value=mode, advice=f"unset {name}")
