"""Layers of small random weights, computed in every way there is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu

from embedstream.consumer.encoders import linear as module
from embedstream.consumer.encoders.linear import SIZES, After, Layer, Linears, Way, rounded, size_of
from embedstream.consumer.measured import Value

INPUTS, OUTPUTS = 24, 40
WEIGHT_BYTES = INPUTS * OUTPUTS * 4


class Kept:
    """Measurements in memory."""

    def __init__(self, **values: Value) -> None:
        self.values: dict[str, Value] = values

    def get(self, name: str) -> Value:
        return self.values.get(name)

    def put(self, name: str, value: Value) -> None:
        self.values[name] = value


def weights(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5).to(dtype), torch.randn(OUTPUTS).to(dtype)


def name_of(after: After) -> str:
    return f"linear-{INPUTS}x{OUTPUTS}-{after}"


def all_by(way: Way, after: After) -> Kept:
    """As if it had been the fastest for every number of tokens."""
    ways: list[Value] = [str(way)] * len(SIZES)
    return Kept(**{name_of(after): ways})


def run(layer: Layer, after: After, hidden: Tensor, residual: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(hidden, residual.clone()) if after is After.ADD else layer(hidden)


def packs(dtype: torch.dtype) -> bool:
    try:
        torch.ops.mkldnn._reorder_linear_weight(weights(dtype)[0])
    except (RuntimeError, AttributeError):
        return False
    return True


EXPECTED: Mapping[After, Callable[[Tensor, Tensor], Tensor]] = {
    After.NOTHING: lambda product, _: product,
    After.GELU: lambda product, _: gelu(product),
    After.GELU_TANH: lambda product, _: gelu(product, approximate="tanh"),
    After.RELU: lambda product, _: relu(product),
    After.ADD: lambda product, residual: product + residual,
}


WAYS = [
    (way, after)
    for way in Way
    for after in After
    if (way is not Way.IN_PLACE or after is After.ADD) and (way is not Way.PACKED_APART or after is not After.NOTHING)
]


@pytest.mark.parametrize("tokens", [1, 2, 7, 130])
@pytest.mark.parametrize(("way", "after"), WAYS)
def test_every_way_computes_the_same(way: Way, after: After, tokens: int) -> None:
    weight, bias = weights()
    hidden, residual = torch.randn(tokens, INPUTS), torch.randn(tokens, OUTPUTS)
    kept = all_by(way, after)
    layer = Linears(kept, 10**6).layer(weight, bias, after)[0]
    assert kept.values == all_by(way, after).values  # nothing was measured: it is this way
    expected = EXPECTED[after](linear(hidden, weight, bias), residual)
    torch.testing.assert_close(run(layer, after, hidden, residual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", After)
def test_half_formats_are_computed_in_the_ways_that_the_cpu_has_instructions_for(
    dtype: torch.dtype, after: After
) -> None:
    weight, bias = weights(dtype)
    hidden, residual = torch.randn(9, INPUTS).to(dtype), torch.randn(9, OUTPUTS).to(dtype)
    kept = all_by(Way.PACKED, after)
    linears = Linears(kept, 10**6)
    layers = linears.layer(weight, bias, after)
    assert (linears.packed_bytes > 0) is packs(dtype)
    expected = EXPECTED[after](linear(hidden, weight, bias), residual)
    for layer in layers:
        torch.testing.assert_close(run(layer, after, hidden, residual), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 1), (2, 1), (3, 4), (8, 4), (9, 16), (32, 16), (128, 64), (512, 256), (513, 1024)]
)
def test_a_batch_goes_as_the_size_that_it_is_nearest_to(tokens: int, size: int) -> None:
    assert SIZES[size_of(tokens)] == size


def test_ways_are_measured_once_for_all_layers_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def times(layers: Mapping[Way, Sequence[Layer]], _: Any, tokens: int) -> dict[Way, float]:
        timed.append(tokens)
        return {way: 1.0 * (way is not Way.PACKED) for way in layers}

    monkeypatch.setattr(module, "_times", times)
    monkeypatch.setattr(module, "_LONG_S", 2)
    kept = Kept()
    first = Linears(kept, 10**6)
    for _ in range(3):
        first.layer(*weights(), After.GELU)
    assert timed == [*SIZES]
    assert kept.values == {name_of(After.GELU): ["packed"] * len(SIZES)}
    assert first.packed_bytes == 3 * WEIGHT_BYTES
    Linears(kept, 10**6).layer(*weights(), After.GELU)
    assert timed == [*SIZES]


def test_a_second_copy_must_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {Way.PLAIN: 1.0, Way.PACKED: 0.95, Way.PACKED_APART: 0.95}
    monkeypatch.setattr(module, "_times", lambda *_: seconds)
    monkeypatch.setattr(module, "_LONG_S", 2)
    kept = Kept()
    linears = Linears(kept, 10**6)
    linears.layer(*weights(), After.GELU)
    assert kept.values == {name_of(After.GELU): ["plain"] * len(SIZES)}
    assert linears.packed_bytes == 0


def test_sizes_that_would_take_long_go_as_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def times(layers: Mapping[Way, Sequence[Layer]], _: Any, tokens: int) -> dict[Way, float]:
        timed.append(tokens)
        return {way: tokens * (2.0 if way is Way.PLAIN else 1.0) for way in layers}

    monkeypatch.setattr(module, "_times", times)
    monkeypatch.setattr(module, "_LONG_S", 10)
    kept = Kept()
    Linears(kept, 10**6).layer(*weights(), After.NOTHING)
    assert timed == [1, 4, 16]
    assert kept.values == {name_of(After.NOTHING): ["packed"] * len(SIZES)}


def test_a_copy_that_pays_for_some_batches_is_there_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, it would have to be a tenth faster; where there is one, it takes nothing to use it."""

    def times(layers: Mapping[Way, Sequence[Layer]], _: Any, tokens: int) -> dict[Way, float]:
        packed = {1: 0.8, 1024: 1.1}.get(tokens, 0.99)
        return {way: packed if way is Way.PACKED else 1.0 for way in layers}

    monkeypatch.setattr(module, "_times", times)
    monkeypatch.setattr(module, "_LONG_S", 2)
    kept = Kept()
    Linears(kept, 10**6).layer(*weights(), After.NOTHING)
    assert kept.values == {name_of(After.NOTHING): [*["packed"] * (len(SIZES) - 1), "plain"]}


@pytest.mark.parametrize(("row_bytes", "most", "count"), [(10 * WEIGHT_BYTES, 64, 10), (10**9, 5, 5), (1, 64, 1)])
def test_layers_of_few_tokens_are_timed_in_a_row(
    row_bytes: int, most: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own weights, as layers of a model have: those of the last one would lie in the cache."""
    monkeypatch.setattr(module, "_ROW_BYTES", row_bytes)
    monkeypatch.setattr(module, "_LONGEST_ROW", most)
    monkeypatch.setattr(module, "_LONG_S", 2)
    rows: dict[int, list[int]] = {}
    hidden, residual = torch.randn(7, INPUTS), torch.randn(7, OUTPUTS)

    def times(layers: Mapping[Way, Sequence[Layer]], _: Any, tokens: int) -> dict[Way, float]:
        rows[tokens] = [len(row) for row in layers.values()]
        for row in layers.values():
            assert len(set(map(id, row))) == len(row)
            for layer in row:
                torch.testing.assert_close(run(layer, After.ADD, hidden, residual), wanted, rtol=1e-5, atol=1e-5)
        return dict.fromkeys(layers, 1.0)

    monkeypatch.setattr(module, "_times", times)
    weight, bias = weights()
    wanted = linear(hidden, weight, bias) + residual
    Linears(Kept(), 10**6).layer(weight, bias, After.ADD)
    assert rows == {tokens: [count if tokens <= 16 else 1] * 4 for tokens in SIZES}


def test_of_a_row_the_time_of_one_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("embedstream.consumer.encoders.linear.time.perf_counter", lambda: next(clock))
    ran: list[int] = []

    def layer(hidden: Tensor) -> Tensor:
        ran.append(len(hidden))
        return hidden

    given = module._Weights(*weights(), After.NOTHING)
    assert module._times({Way.PLAIN: [layer] * 4, Way.PACKED: [layer] * 2}, given, 3) == {
        Way.PLAIN: 1 / 4,
        Way.PACKED: 1 / 2,
    }
    assert ran == [3] * (4 + 2) * 2  # a round that warms up, and one that was enough


def test_batches_are_rounded_up_to_few_numbers_of_tokens() -> None:
    assert [rounded(tokens) for tokens in range(1, 33)] == [*range(1, 33)]
    all_of_them = np.arange(1, 16385)
    found = np.array([rounded(int(tokens)) for tokens in all_of_them])
    assert (found >= all_of_them).all()
    assert (np.diff(found) >= 0).all()
    assert all(rounded(tokens) == tokens for tokens in set(found.tolist()))
    assert ((found - all_of_them) / all_of_them).max() < 0.1
    assert (found / all_of_them).mean() < 1.006
    assert len(set(found)) < 420


@pytest.mark.parametrize("lacking", [False, True])
def test_without_measuring_few_tokens_take_a_copy(lacking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured"))
    if lacking:
        monkeypatch.setattr(module, "_agree", lambda *_: False)
    kept = Kept()
    linears = Linears(kept, 10**6, measures=False)
    linears.layer(*weights(), After.GELU)
    few = Way.PLAIN if lacking else Way.PACKED
    assert linears._ways[f"{weights()[0].shape[1]}x{weights()[0].shape[0]}-gelu"] == (few,) * 3 + (Way.PLAIN,) * 3
    assert kept.values == {}


def test_real_timing_gives_every_way_a_time() -> None:
    kept = Kept()
    layers = Linears(kept, 10**6).layer(*weights(), After.ADD)
    found = kept.values[name_of(After.ADD)]
    assert isinstance(found, list)
    assert len(found) == len(layers) == len(SIZES)
    assert set(found) <= {*map(str, Way)}


@pytest.mark.parametrize("found", [None, [], ["plain"], ["quantum"] * len(SIZES), "plain", [1] * len(SIZES), {}])
def test_what_was_kept_is_checked(found: Value, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_times", lambda candidates, *_: dict.fromkeys(candidates, 0.001))
    kept = Kept(**{name_of(After.NOTHING): found})
    Linears(kept, 10**6).layer(*weights(), After.NOTHING)
    assert kept.values == {name_of(After.NOTHING): ["plain"] * len(SIZES)}


def test_layers_beyond_the_limit_do_without_a_second_copy() -> None:
    linears = Linears(all_by(Way.PACKED, After.ADD), 2 * WEIGHT_BYTES)
    hidden, residual = torch.randn(5, INPUTS), torch.randn(5, OUTPUTS)
    weight, bias = weights()
    expected = linear(hidden, weight, bias) + residual
    for _ in range(4):
        layer = linears.layer(weight, bias, After.ADD)[0]
        torch.testing.assert_close(run(layer, After.ADD, hidden, residual), expected, rtol=1e-5, atol=1e-5)
    assert linears.packed_bytes == 2 * WEIGHT_BYTES
    assert Linears(all_by(Way.PACKED, After.ADD), 0).layer(weight, bias, After.ADD)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_without_operators_of_onednn_all_is_plain(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Tensor:
        raise error("no such operator")

    monkeypatch.setattr(module, "_pack", fail)
    kept = all_by(Way.PACKED, After.GELU)
    linears = Linears(kept, 10**6)
    linears.layer(*weights(), After.GELU)
    assert linears.packed_bytes == 0


def test_a_way_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._pack

    def wrong(weight: Tensor) -> Any:
        return real(weight * 1.01)

    monkeypatch.setattr(module, "_pack", wrong)
    kept = all_by(Way.PACKED, After.NOTHING)
    linears = Linears(kept, 10**6)
    linears.layer(*weights(), After.NOTHING)
    assert linears.packed_bytes == 0
