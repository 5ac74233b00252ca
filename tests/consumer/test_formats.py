"""Which number formats there are for a model on a device, and how exact float32 is."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from embedstream.consumer import formats as module
from embedstream.consumer.formats import bfloat16_feature, bfloat16_gain, formats, set_float32_precision
from embedstream.consumer.measured import Conditions, Measured
from embedstream.shared.settings import Dtype, Float32Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def here() -> Measured:
    """Nothing was measured before, and nothing is kept."""
    return Measured(Conditions("weights", "cpu"), None)


def found(device: torch.device, config: dict[str, Any] | None = None) -> list[torch.dtype]:
    return [each.dtype for each in formats(Dtype.AUTO, device, config or {}, here())]


def pretend(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """A CPU with some features and no others."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True), raising=False)


def pretend_gain(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[float]:
    """A CPU that is so fast in bfloat16. The list grows with each timing."""
    timed: list[float] = []

    def time_it() -> float:
        timed.append(gain)
        return gain

    monkeypatch.setattr(module, "bfloat16_gain", time_it)
    return timed


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("feature", "name"), [("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")]
)
def test_a_cpu_that_is_fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch, feature: str, name: str) -> None:
    pretend(monkeypatch, feature, "avx2")
    pretend_gain(monkeypatch, 3.14)
    first, last = formats(Dtype.AUTO, CPU, {}, here())
    assert (first.dtype, first.reason) == (BF16, f"CPU with {name}, 3.1 times as fast as float32")
    assert last.dtype is F32


def test_bfloat16_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine shows the feature and withholds the instructions: torch then computes by way of float32."""
    pretend(monkeypatch, "amx_bf16")
    pretend_gain(monkeypatch, 1.1)
    (only,) = formats(Dtype.AUTO, CPU, {}, here())
    assert only.dtype is F32
    assert only.reason == "CPU with AMX, on which a layer in bfloat16 is 1.1 times as fast as in float32"


def test_a_cpu_without_the_instructions_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx512_f", "avx512_fp16", "fp16_arith")
    timed = pretend_gain(monkeypatch, 9.0)
    assert found(CPU) == [F32]
    assert not timed


def test_a_cpu_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "amx_bf16")
    timed = pretend_gain(monkeypatch, 3.0)
    measured = here()
    assert formats(Dtype.AUTO, CPU, {}, measured) == formats(Dtype.AUTO, CPU, {}, measured)
    assert len(timed) == 1


def test_the_timing_runs_a_layer_in_both_formats() -> None:
    assert 0 < bfloat16_gain() < 1000


@pytest.mark.parametrize(
    ("helpers", "feature"),
    [
        ({"_is_amx_tile_supported": True, "_is_avx512_bf16_supported": True}, "AMX"),
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}, "AVX512-BF16"),
        ({"_is_avx512_bf16_supported": True}, "AVX512-BF16"),
        ({}, None),
    ],
)
def test_a_torch_that_lists_no_features(
    monkeypatch: pytest.MonkeyPatch, helpers: dict[str, bool], feature: str | None
) -> None:
    old = SimpleNamespace(**{name: lambda has=has: has for name, has in helpers.items()})
    monkeypatch.setattr(torch, "cpu", old)
    assert bfloat16_feature() == feature


@pytest.mark.parametrize("kind", ["deberta", "mobilebert"])
def test_a_model_that_needs_float32(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pretend(monkeypatch, "amx_bf16")
    for device in (CPU, CUDA):
        (only,) = formats(Dtype.AUTO, device, {"model_type": kind}, here())
        assert (only.dtype, only.reason.partition(",")[0]) == (F32, kind)


def test_other_devices() -> None:
    assert found(torch.device("mps")) == [F32]


def test_a_format_that_is_asked_for() -> None:
    (only,) = formats(Dtype.FLOAT16, CPU, {"model_type": "deberta"}, here())
    assert (only.dtype, only.reason, only.name) == (F16, "asked for", "float16")


@pytest.mark.parametrize(
    ("config", "there", "elsewhere"),
    [
        ({"model_type": "bert", "torch_dtype": "float32"}, [F16, BF16, F32], [F16, F32]),
        ({"model_type": "qwen3", "torch_dtype": "bfloat16"}, [BF16, F32], [F16, F32]),
        ({"model_type": "qwen3", "text_config": {"dtype": "bfloat16"}}, [BF16, F32], [F16, F32]),
        ({"model_type": "gemma3_text", "dtype": "float32"}, [BF16, F32], [F32]),
        ({"model_type": ["odd"], "dtype": {}}, [F16, BF16, F32], [F16, F32]),
    ],
)
def test_on_cuda(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], there: list[torch.dtype], elsewhere: list[torch.dtype]
) -> None:
    for bfloat16, expected in ((True, there), (False, elsewhere)):
        pretend_cuda(monkeypatch, bfloat16=bfloat16)
        assert found(CUDA, config) == expected


def test_a_cuda_device_that_multiplies_halves_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, bfloat16=False, capability=(6, 1))
    assert found(CUDA) == [F32]


@pytest.fixture
def float32_as_it_was() -> Iterator[None]:
    precision, rounds = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = rounds


@pytest.mark.usefixtures("float32_as_it_was")
@pytest.mark.parametrize(
    ("precision", "multiplies", "convolves"), [("ieee", "ieee", ("ieee", "none")), ("tf32", "tf32", ("tf32",))]
)
def test_float32_is_what_it_is_said_to_be(
    precision: Float32Precision, multiplies: str, convolves: tuple[str, ...]
) -> None:
    """What was set before, such as by a library, does not matter; torch's default rounds in convolutions."""
    backends: Any = torch.backends  # mypy does not see what is made at run time
    other = {"ieee": "tf32", "tf32": "ieee"}[precision]
    for before in (other, precision):
        set_float32_precision(Float32Precision(before))
        set_float32_precision(Float32Precision(precision))
        assert backends.cuda.matmul.fp32_precision == multiplies
        assert backends.mkldnn.matmul.fp32_precision == multiplies
        assert backends.cudnn.conv.fp32_precision in convolves
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[precision]


@pytest.mark.usefixtures("float32_as_it_was")
def test_onednn_may_be_told_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with structlog.testing.capture_logs() as logs:
        set_float32_precision(Float32Precision.IEEE)
    assert [(log["event"], log["variable"]) for log in logs] == [
        ("model.float32_rounded", "ONEDNN_DEFAULT_FPMATH_MODE")
    ]
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    with structlog.testing.capture_logs() as logs:
        set_float32_precision(Float32Precision.IEEE)
    assert not logs
