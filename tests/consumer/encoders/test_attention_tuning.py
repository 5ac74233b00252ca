from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embedstream.consumer.encoders import attention, attention_tuning
from embedstream.consumer.encoders.attention import AS_USUAL, LENGTHS, Kernel, Tuning
from embedstream.consumer.encoders.attention_tuning import heads_of, tuned
from embedstream.consumer.encoders.layout import Layout

CPU = torch.device("cpu")
BY_LAYER: Any = transformers.EmbeddingGemma2TextConfig  # whose fields have types of their own
SHAPE: dict[str, Any] = {"heads": 4, "key_heads": 2, "head_dim": 8}


class Store(dict[str, Any]):
    def put(self, name: str, value: Any) -> None:
        self[name] = value


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Kernel], int]]:
    """What was timed, and the tokens of it; MATMUL is the fastest by far for short sequences, but for a query."""
    seen: list[tuple[list[Kernel], int]] = []

    def times(kernels: list[Kernel], layout: Layout, *others: Any) -> dict[Kernel, float]:
        seen.append((kernels, layout.total))
        of_matmul = 0.5 if len(layout) > 1 and layout.lengths.mean() <= 70 else 0.93
        return {kernel: 1.0 if kernel is not Kernel.MATMUL else of_matmul for kernel in kernels}

    monkeypatch.setattr(attention_tuning, "_times", times)
    return seen


def test_the_fastest_is_found_for_each_length_once(timed: list[tuple[list[Kernel], int]]) -> None:
    store = Store()
    found = tuned(store, CPU, torch.float32, **SHAPE)
    assert found == Tuning(Kernel.FUSED, by_length=(Kernel.MATMUL, Kernel.MATMUL, *[Kernel.FUSED] * 3))
    assert timed == [
        ([Kernel.FUSED, Kernel.MATMUL], tokens) for tokens in (15, 68 * 15, 16 * 61, 8 * 123, 4 * 251, 1021)
    ]
    assert tuned(store, CPU, torch.float32, **SHAPE) == found
    assert len(timed) == 1 + len(LENGTHS)


@pytest.mark.parametrize(
    ("dtype", "key_heads", "left_out"),
    [
        (torch.bfloat16, 4, set()),
        (torch.bfloat16, 2, {Kernel.SOME, Kernel.SOME_ONEDNN}),
        (torch.float32, 4, {Kernel.FLOAT32}),
        (torch.float32, 2, {Kernel.SOME, Kernel.SOME_ONEDNN, Kernel.FLOAT32}),
    ],
)
def test_kernels_that_would_be_the_fused_one_are_not_tried(
    dtype: torch.dtype, key_heads: int, left_out: set[Kernel], timed: list[tuple[list[Kernel], int]]
) -> None:
    tuned(Store(), CPU, dtype, **SHAPE | {"key_heads": key_heads})
    assert timed[0][0] == [kernel for kernel in Kernel if kernel not in left_out]


@pytest.mark.parametrize("kernel", [kernel for kernel in Kernel if kernel is not Kernel.FUSED])
def test_less_than_noise_changes_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_tuning, "_times", lambda kernels, *_: {one: 0.96 if one is kernel else 1.0 for one in kernels}
    )
    found = tuned(Store(), CPU, torch.bfloat16, heads=4, key_heads=4, head_dim=8)
    assert found == Tuning(Kernel.FUSED, by_length=(Kernel.FUSED,) * 5)


@pytest.mark.parametrize(
    "found", [["fused"], ["fused", "matmul", "new", "fused", "fused", "fused"], ["some"] * 6, 3, None]
)
def test_what_cannot_be_used_is_measured_anew(found: Any, timed: list[tuple[list[Kernel], int]]) -> None:
    store = Store({"attention-4-2x8": found})
    tuned(store, CPU, torch.float32, **SHAPE)
    assert store["attention-4-2x8"] == ["fused", "matmul", "matmul", "fused", "fused", "fused"]


def test_other_devices_have_no_choice(timed: list[tuple[list[Kernel], int]]) -> None:
    assert tuned(Store(), torch.device("meta"), torch.float16, **SHAPE) is AS_USUAL
    assert not timed


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.BertConfig(hidden_size=32, num_attention_heads=4), (4, 4, 8)),
        (
            transformers.Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
            (4, 2, 16),
        ),
        (transformers.DistilBertConfig(dim=32, n_heads=4), (4, 4, 8)),
        (transformers.PreTrainedConfig(), None),
        (BY_LAYER(head_dim=8, global_head_dim=16), None),
    ],
    ids=["bert", "grouped heads of their own size", "other names", "nothing said", "by layer"],
)
def test_heads_are_read_from_the_configuration(config: Any, expected: tuple[int, int, int] | None) -> None:
    assert heads_of(config) == expected


def test_timing_runs_each_kernel() -> None:
    seconds = attention_tuning._times(list(Kernel), Layout(np.array([16, 16])), torch.bfloat16, 4, 4, 8)
    assert set(seconds) >= {*Kernel} - {Kernel.SOME_ONEDNN}
    assert all(0 < each < 60 for each in seconds.values())


def test_kernels_are_timed_on_lengths_that_differ_and_count_as_one() -> None:
    query, *batches = attention_tuning._layouts()
    assert query.lengths.tolist() == [LENGTHS[0]]
    for place, layout in enumerate(batches):
        assert len(layout) == 1 or len(layout.groups) >= 4
        by_length = [Kernel.FUSED] * len(LENGTHS)
        by_length[place] = Kernel.MATMUL
        tuning = Tuning(by_length=tuple(by_length))
        matched = sum(tuning.kernel_of(layout.total, int(length)) is Kernel.MATMUL for length in layout.lengths)
        assert matched >= 0.75 * len(layout)


def test_the_first_run_of_each_kernel_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, runs = [0.0], iter([1.0, 2.0, 30.0, 50.0, 40.0, 60.0])

    def run(*_: object, **__: object) -> None:
        now[0] += next(runs)

    monkeypatch.setattr(attention_tuning, "by_groups", run)
    monkeypatch.setattr("embedstream.consumer.encoders.attention_tuning.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(attention_tuning, "_ENOUGH_S", 100.0)
    monkeypatch.setattr(attention_tuning, "_ROUNDS", 3)
    layout = Layout(np.array([16]))
    seconds = attention_tuning._times([Kernel.FUSED, Kernel.MATMUL], layout, torch.float32, 4, 4, 8)
    assert seconds == {Kernel.FUSED: 30.0, Kernel.MATMUL: 50.0}


def test_a_kernel_that_this_cpu_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setitem(attention._SOFTMAX, Kernel.SOME_ONEDNN, refuse)
    seconds = attention_tuning._times(list(Kernel), Layout(np.array([16, 16])), torch.bfloat16, 4, 4, 8)
    assert set(seconds) == {*Kernel} - {Kernel.SOME_ONEDNN}


@pytest.mark.parametrize(
    ("length", "place"), [(1, 0), (30, 0), (31, 1), (87, 1), (88, 2), (176, 2), (177, 3), (506, 3), (507, 4), (9999, 4)]
)
def test_a_sequence_takes_the_kernel_of_the_nearest_length(length: int, place: int) -> None:
    kernels = [Kernel.FUSED] * len(LENGTHS)
    kernels[place] = Kernel.FLOAT32
    assert Tuning(by_length=tuple(kernels)).kernel_of(65, length) is Kernel.FLOAT32
    assert Tuning(Kernel.MATMUL).kernel_of(65, length) is Kernel.MATMUL


@pytest.mark.parametrize(("tokens", "length", "few"), [(1, 1, True), (64, 1, True), (64, 32, True), (65, 65, False)])
def test_a_call_of_few_tokens_has_a_kernel_of_its_own(tokens: int, length: int, few: bool) -> None:
    found = Tuning(Kernel.FUSED, by_length=(Kernel.MATMUL,) * 4).kernel_of(tokens, length)
    assert found is (Kernel.FUSED if few else Kernel.MATMUL)
