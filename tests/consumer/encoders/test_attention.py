from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from embedstream.consumer.encoders import attention
from embedstream.consumer.encoders.attention import Kernel, Pattern, Tuning, attend, register, visible
from embedstream.consumer.encoders.layout import Layout

HEADS, DIM, SCALE = 4, 8, 0.3
LENGTHS = np.array([3, 300, 5, 3, 1, 300, 7])
PATTERNS = (
    Pattern(),
    Pattern(right=0),
    Pattern(left=3, right=3),
    Pattern(left=7, right=0),
    Pattern(left=100),
    Pattern(right=2),
    Pattern(left=500, right=0),
    Pattern(soft_cap=2.0),
    Pattern(left=70, right=0, soft_cap=5.0),
)
FUSED, MATMUL, SOME = Tuning(Kernel.FUSED), Tuning(Kernel.MATMUL), Tuning(Kernel.SOME)
ONEDNN = Tuning(Kernel.SOME_ONEDNN)
SOME_ROWS, SOME_QUERIES = Tuning(Kernel.MATMUL, scores_bytes=100_000), Tuning(Kernel.MATMUL, scores_bytes=1)


def made(total: int, key_heads: int = HEADS, value_dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(total, HEADS, DIM), torch.randn(total, key_heads, DIM), torch.randn(total, key_heads, value_dim)


def has_onednn(dtype: torch.dtype) -> bool:
    try:
        attention._softmax_of_onednn(torch.zeros(1, 2, 2, dtype=dtype))
    except RuntimeError:
        return False
    return True


def watch_softmax(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of scores that bundles have."""
    seen: list[torch.Size] = []

    def softmax(scores: Tensor) -> Tensor:
        seen.append(scores.shape)
        return scores.softmax(-1)

    monkeypatch.setitem(attention._SOFTMAX, Kernel.SOME, softmax)
    return seen


def expected(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], pattern: Pattern) -> Tensor:
    """By the book, one sequence at a time, in float64."""
    parts = []
    for one, other, third in zip(*(torch.split(part.double(), lengths) for part in (query, key, value)), strict=True):
        repeats = HEADS // key.shape[1]
        scores = torch.einsum("qhd,khd->hqk", one, other.repeat_interleave(repeats, 1)) * SCALE
        if pattern.soft_cap is not None:
            scores = pattern.soft_cap * torch.tanh(scores / pattern.soft_cap)
        distance = torch.arange(len(one)) - torch.arange(len(one)).unsqueeze(1)
        left, right = (len(one) if size is None else size for size in (pattern.left, pattern.right))
        scores = scores.masked_fill((distance < -left) | (distance > right), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), third.repeat_interleave(repeats, 1)))
    return torch.cat(parts).float()


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "tuning", [FUSED, MATMUL, SOME, ONEDNN, SOME_ROWS], ids=["fused", "matmul", "some", "onednn", "some rows at a time"]
)
def test_each_token_attends_to_its_own_sequence(tuning: Tuning, pattern: Pattern, key_heads: int) -> None:
    layout = Layout(LENGTHS)
    given = made(layout.total, key_heads)
    output = attend(*given, layout, pattern=pattern, scale=SCALE, tuning=tuning)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected(*given, layout.lengths.tolist(), pattern), atol=3e-6, rtol=0)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(right=0), Pattern(left=2, right=1)], ids=str)
def test_scores_of_one_query_at_a_time_are_the_least(pattern: Pattern) -> None:
    layout = Layout(np.array([9, 9, 2]))
    given = made(layout.total, key_heads=2, value_dim=5)
    output = attend(*given, layout, pattern=pattern, scale=SCALE, tuning=SOME_QUERIES)
    torch.testing.assert_close(output, expected(*given, [9, 9, 2], pattern), atol=3e-6, rtol=0)


@pytest.mark.parametrize("tuning", [FUSED, MATMUL, SOME, ONEDNN], ids=["fused", "matmul", "some", "onednn"])
def test_parts_of_one_matrix_and_heads_before_tokens_are_taken_as_they_are(tuning: Tuning) -> None:
    layout = Layout(np.array([6, 6, 4]))
    joined = torch.randn(layout.total, 3, HEADS, DIM)
    query, key, value = joined.unbind(1)
    wanted = expected(query, key, value, [6, 6, 4], Pattern())
    heads_first = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (query, key, value)]
    for one, other, third in ((query, key, value), heads_first):
        output = attend(one, other, third, layout, pattern=Pattern(), scale=SCALE, tuning=tuning)
        assert output.is_contiguous()
        torch.testing.assert_close(output, wanted, atol=3e-6, rtol=0)


@pytest.mark.parametrize("kernel", list(Kernel))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats(kernel: Kernel, dtype: torch.dtype) -> None:
    if kernel is Kernel.SOME_ONEDNN and not has_onednn(dtype):
        pytest.skip("oneDNN has no softmax for it on this CPU")
    layout = Layout(LENGTHS)
    # All of a sequence seen by heads with keys of their own, for that alone is done by each kernel.
    pattern, key_heads = (Pattern(), HEADS) if kernel in attention._SOFTMAX else (Pattern(left=3, right=1), 2)
    query, key, value = (part.to(dtype) for part in made(layout.total, key_heads))
    output = attend(query, key, value, layout, pattern=pattern, scale=SCALE, tuning=Tuning(kernel))
    assert output.dtype is dtype
    wanted = expected(query, key, value, layout.lengths.tolist(), pattern)
    # In float32 only the output is rounded, to the nearest.
    eps = torch.finfo(dtype).eps
    relative, absolute = (0.51 * eps, 1e-6) if kernel is Kernel.FLOAT32 else (0, 4 * eps)
    torch.testing.assert_close(output.float(), wanted, atol=absolute, rtol=relative)


@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "tuning", [FUSED, MATMUL, SOME, SOME_QUERIES], ids=["fused", "matmul", "some", "some queries at a time"]
)
def test_a_few_short_sequences_in_one_call_do_not_see_each_other(
    tuning: Tuning, pattern: Pattern, key_heads: int
) -> None:
    lengths = [40, 30, 12, 9, 9, 8, 4, 1]
    layout = Layout(np.array(lengths))
    assert 1 < len(layout.runs) < len(layout.groups)
    for number in range(2):  # in a second layer masks are there
        query, key, value = (part + number for part in made(layout.total, key_heads))
        output = attend(query, key, value, layout, pattern=pattern, scale=SCALE, tuning=tuning)
        wanted = expected(query, key, value, lengths, pattern)
        torch.testing.assert_close(output, wanted, atol=3e-6, rtol=0)


@pytest.mark.parametrize("lengths", [[40], [9, 8, 7], [300, 300, 5]], ids=["one", "a few short", "several calls"])
@pytest.mark.parametrize("kernel", Kernel)
def test_rows_of_no_sequence_change_nothing_and_become_zeros(kernel: Kernel, lengths: list[int]) -> None:
    layout = Layout(np.array(lengths))
    given = made(layout.total + 3, value_dim=5)
    for part in given:
        part[layout.total :] = torch.nan
    output = attend(*given, layout, pattern=Pattern(), scale=SCALE, tuning=Tuning(kernel))
    assert output.shape == (layout.total + 3, HEADS, 5)
    assert (output[layout.total :] == 0).all()
    query, key, value = (part[: layout.total] for part in given)
    wanted = expected(query, key, value, layout.lengths.tolist(), Pattern())
    torch.testing.assert_close(output[: layout.total], wanted, atol=3e-6, rtol=0)


def test_a_few_sequences_are_multiplied_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_softmax(monkeypatch)
    lengths = [600] * 2 + [100] * 11 + [90] + [9, 8, 7]  # the last ones as if they were one
    layout = Layout(np.array(lengths))
    given = made(layout.total)
    output = attend(*given, layout, pattern=Pattern(), scale=SCALE, tuning=SOME)
    times = [(1, 600), (1, 600), (4, 100), (4, 100), (4, 104)]
    assert [tuple(shape) for shape in seen] == [(rows * HEADS, n, n) for rows, n in times]
    torch.testing.assert_close(output, expected(*given, lengths, Pattern()), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("lengths", "bundled"), [([40], False), ([40, 24], False), ([40, 25], True), ([65], True)])
def test_few_tokens_are_not_bundled(lengths: list[int], bundled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_softmax(monkeypatch)
    layout = Layout(np.array(lengths))
    given = made(layout.total)
    tuning = Tuning(Kernel.FUSED, by_length=(Kernel.SOME,) * 5)
    output = attend(*given, layout, pattern=Pattern(), scale=SCALE, tuning=tuning)
    assert bool(seen) is bundled
    torch.testing.assert_close(output, expected(*given, lengths, Pattern()), atol=3e-6, rtol=0)


def test_layers_that_differ_share_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_softmax(monkeypatch)
    lengths = [90, 80, 80, 70]
    layout = Layout(np.array(lengths))
    for tuning in (SOME, FUSED):
        seen.clear()
        for pattern in (Pattern(), Pattern(right=0), Pattern(left=10, right=10)):
            for key_heads in (HEADS, 1):
                given = made(layout.total, key_heads)
                output = attend(*given, layout, pattern=pattern, scale=SCALE, tuning=tuning)
                torch.testing.assert_close(output, expected(*given, lengths, pattern), atol=3e-6, rtol=0)
        assert bool(seen) is (tuning is SOME)
    query, key, value = (part.bfloat16() for part in made(layout.total))
    output = attend(query, key, value, layout, pattern=Pattern(), scale=SCALE, tuning=SOME)
    wanted = expected(query, key, value, lengths, Pattern())
    torch.testing.assert_close(output.float(), wanted, atol=4 * torch.finfo(torch.bfloat16).eps, rtol=0)


def test_layers_with_other_windows_have_other_masks() -> None:
    layout = Layout(np.array([9, 8, 7]))
    assert len(layout.runs) == 1
    given = made(layout.total, value_dim=5)  # which torch computes by a kernel that puts heads before tokens
    for pattern in (Pattern(), Pattern(right=0), Pattern(left=2, right=2)):
        output = attend(*given, layout, pattern=pattern, scale=SCALE)
        assert output.is_contiguous()
        torch.testing.assert_close(output, expected(*given, [9, 8, 7], pattern), atol=3e-6, rtol=0)


def test_windows_far_shorter_than_a_sequence_meet_only_the_keys_that_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def watched(query: Tensor, key: Tensor, *others: Tensor, **options: object) -> Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return scaled_dot_product_attention(query, key, *others, **options)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    layout, pattern = Layout(np.array([1000])), Pattern(left=40, right=40)
    given = made(1000)
    output = attend(*given, layout, pattern=pattern, scale=SCALE, tuning=FUSED)
    torch.testing.assert_close(output, expected(*given, [1000], pattern), atol=3e-6, rtol=0)
    assert max(keys for _, keys in seen) == 160
    assert sum(queries for queries, _ in seen) == 1000


@pytest.mark.parametrize(
    ("pattern", "sees_all", "is_causal"),
    [
        (Pattern(), True, False),
        (Pattern(left=9, right=9), True, False),
        (Pattern(left=8), False, False),
        (Pattern(right=0), False, True),
        (Pattern(left=9, right=0), False, True),
        (Pattern(left=8, right=0), False, False),
    ],
    ids=str,
)
def test_windows_that_cut_nothing_off_are_none(pattern: Pattern, sees_all: bool, is_causal: bool) -> None:
    assert (pattern.sees_all(10), pattern.is_causal(10)) == (sees_all, is_causal)


def test_a_window_is_seen_from_each_query() -> None:
    places = torch.arange(4)
    assert visible(places[1:3], places, Pattern(left=1, right=0)).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]


def test_a_device_with_a_kernel_of_its_own_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_OF_DEVICE", {})
    layout = Layout(np.array([2, 2]))
    given = made(4)

    def only_causal(query: Tensor, *_: object, pattern: Pattern, **__: object) -> Tensor | None:
        return torch.full_like(query, 7) if pattern.right == 0 else None

    register("cpu", only_causal)
    assert (attend(*given, layout, pattern=Pattern(right=0), scale=SCALE) == 7).all()
    other = attend(*given, layout, pattern=Pattern(), scale=SCALE)
    torch.testing.assert_close(other, expected(*given, [2, 2], Pattern()), atol=3e-6, rtol=0)
