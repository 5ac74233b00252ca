"""What docs/models.md promises of half formats, and what becomes of a model that is not good enough in one."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from embedstream.consumer import allocator, loading
from embedstream.consumer import formats as hardware
from embedstream.consumer.agreement import HALF_COSINE, agreement
from embedstream.consumer.direct import Direct
from embedstream.consumer.formats import Format
from embedstream.consumer.loading import Source
from embedstream.consumer.measured import Conditions, Measured, Value
from embedstream.consumer.model import Model
from embedstream.consumer.precision import HALF_ORDER, PROBES, Check, Verdict, compare, settle, vectors_of
from embedstream.consumer.probe_texts import SHORT
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.settings import Dtype, PoolingName, Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TEXTS = [*SHORT.values()][::-3]  # among them the empty one, which has the least cosine
BOUNDS = {Dtype.BFLOAT16: HALF_COSINE, Dtype.FLOAT16: 0.99999}
F16, BF16 = Format(torch.float16, "fine"), Format(torch.bfloat16, "wide")
F32 = Format(torch.float32, "exact")

MakeModel = Callable[..., Path]


def vectors(model: Model, *, alone: bool = False) -> Sequence[NDArray[Any]]:
    found = Direct(model, 4096).embed(TEXTS, alone=alone).vectors
    return [vector for vector in found if vector is not None]


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_the_published_bound(minilm: Model, dtype: Dtype) -> None:
    # A short limit spares the long warm-up, which takes seconds in a format that this CPU has no instructions for.
    half = Model.load(Settings(model="all-MiniLM-L6-v2", dtype=dtype, device="cpu", threads=1, max_model_len=64))
    exact, together, alone = vectors(minilm), vectors(half), vectors(half, alone=True)
    assert len(exact) == len(together) == len(alone) == len(TEXTS)
    assert all(vector.dtype == np.float32 for vector in together)
    assert BOUNDS[dtype] <= agreement(together, exact).cosine < 1
    assert agreement(together, alone).cosine >= BOUNDS[dtype]
    said = re.fullmatch(r"asked for; (\d+) probe texts, least cosine ([01]\.\d{5})", half.dtype_reason)
    assert said is not None
    assert int(said[1]) == len(PROBES)
    assert float(said[2]) >= BOUNDS[dtype]


def test_the_page_publishes_these_bounds() -> None:
    text = " ".join(PAGE.read_text().split())
    (promised,) = re.findall(r"is at least (0\.9+) in bfloat16, and (0\.9+) in float16", text)
    assert tuple(map(float, promised)) == tuple(BOUNDS.values())
    (order,) = re.findall(r"rank correlation of at least (0\.\d+)", text)
    assert float(order) == HALF_ORDER
    (n_texts,) = re.findall(r"the vectors of (\d+) built-in texts", text)
    assert int(n_texts) == len(PROBES)


# Judging


def spread(n_texts: int = 8) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {str(place): rng.standard_normal(16).astype(np.float32) for place in range(n_texts)}


def moved(exact: Mapping[str, NDArray[np.float32]], by: float) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    return {name: (row + by * rng.standard_normal(16)).astype(np.float32) for name, row in exact.items()}


def test_vectors_that_are_nearly_the_same_pass() -> None:
    exact = spread()
    assert compare(exact, exact).order == pytest.approx(1.0)
    verdict = compare(moved(exact, 0.002), exact)
    assert verdict.passed
    assert str(verdict) == "8 probe texts, least cosine 0.99999"  # rounded down


def test_one_text_that_is_off_is_named() -> None:
    exact = spread()
    verdict = compare({**exact, "5": exact["5"] + 0.2 * exact["1"]}, exact)
    assert not verdict.passed
    assert verdict.at == "5"
    assert re.fullmatch(r"8 probe texts, least cosine 0\.9\d{4} \(5\), at least 0\.999 wanted", str(verdict))


def test_neighbours_count_where_all_vectors_lie_close_together() -> None:
    """Every cosine is good enough, and still the neighbours are others."""
    exact = {name: row * 0.005 + 1 for name, row in spread().items()}
    verdict = compare(moved(exact, 0.005), exact)
    assert verdict.cosine > HALF_COSINE
    assert not verdict.passed
    assert "order of neighbours" in str(verdict)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_never_passes(value: float) -> None:
    exact = spread()
    verdict = compare({**exact, "3": np.full(16, value, np.float32)}, exact)
    assert (verdict.passed, str(verdict)) == (False, "values that are not numbers (3)")


def test_vectors_of_tokens_are_judged_by_their_cosine_alone() -> None:
    exact = {name: np.stack([row, row + 1]) for name, row in spread().items()}
    assert compare(exact, exact).order == 1.0
    assert not compare({**exact, "2": -exact["2"]}, exact).passed


def test_a_verdict_is_read_back() -> None:
    verdict = Verdict(3, 0.5, 1.0, "a")
    assert Verdict.remembered(verdict.as_value()) == verdict
    others: tuple[Value, ...] = (None, 1.0, {}, {"n_texts": 3, "cosine": "1", "order": 1.0, "at": "a"})
    for other in others:
        assert Verdict.remembered(other) is None


# Settling


class Toy:
    """A model in a number format."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.cycle = self  # as modules that know their parent


class Trials:
    """Counts what is loaded, one at a time; each format is off by so much."""

    def __init__(self, off: Mapping[torch.dtype, float], skipped: str = "", folder: Path | None = None) -> None:
        self.off = off
        self.loaded: list[torch.dtype] = []
        self.alive: weakref.WeakSet[Toy] = weakref.WeakSet()
        self.fails: Exception | None = None
        kept = Measured(Conditions("w", "cpu"), folder)
        self.check: Check[Toy] = Check("vectors", self.exact, self.vectors, kept.with_dtype, lambda: skipped)

    def exact(self) -> dict[str, NDArray[np.float32]]:
        if self.fails is not None:
            raise self.fails
        model = self.load(torch.float32)
        return moved(spread(), self.off.get(model.dtype, 0.0))

    def vectors(self, model: Toy) -> dict[str, NDArray[np.float32]]:
        return moved(spread(), self.off.get(model.dtype, 0.0))

    def load(self, dtype: torch.dtype) -> Toy:
        self.loaded.append(dtype)
        if self.off.get(dtype) == np.inf:
            raise ModelLoadError("no kernel for it")
        assert not self.alive  # there may be no room for two
        model = Toy(dtype)
        self.alive.add(model)
        return model


def test_the_first_format_that_is_good_enough() -> None:
    trials = Trials({torch.float16: 0.001})
    model, reason = settle((F16, BF16, F32), trials.check, trials.load)
    assert (model.dtype, trials.loaded) == (torch.float16, [torch.float32, torch.float16])
    assert reason == "fine; 8 probe texts, least cosine 0.99999"


@pytest.mark.parametrize("bad", [1.0, np.nan, np.inf])
def test_one_that_is_not_gives_way_to_the_next(bad: float) -> None:
    trials = Trials({torch.float16: bad})
    with structlog.testing.capture_logs() as logs:
        model, reason = settle((F16, BF16, F32), trials.check, trials.load)
    assert model.dtype is torch.bfloat16
    assert trials.loaded == [torch.float32, torch.float16, torch.bfloat16]
    assert reason.startswith("wide; not float16: ")
    assert [(log["event"], log["dtype"], log["log_level"]) for log in logs] == [
        ("model.format_refused", "float16", "warning")
    ]


def test_memory_goes_back_between_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials({torch.float16: 1.0})
    seen: list[tuple[int, list[torch.dtype]]] = []
    monkeypatch.setattr(allocator, "give_back", lambda: seen.append((len(trials.alive), [*trials.loaded])))
    settle((F16, F32), trials.check, trials.load)
    assert seen == [(0, [torch.float32]), (0, [torch.float32, torch.float16])]


def test_float32_in_the_end() -> None:
    trials = Trials({torch.float16: 1.0, torch.bfloat16: np.nan})
    model, reason = settle((F16, BF16, F32), trials.check, trials.load)
    assert model.dtype is torch.float32
    assert reason.startswith("exact; not float16: 8 probe texts, least cosine 0.")
    assert reason.endswith("; not bfloat16: values that are not numbers (0)")


def test_what_is_asked_for_is_served_with_a_warning() -> None:
    trials = Trials({torch.bfloat16: 1.0})
    with structlog.testing.capture_logs() as logs:
        model, reason = settle((Format(torch.bfloat16, "asked for"),), trials.check, trials.load)
    assert model.dtype is torch.bfloat16
    assert reason.startswith("asked for; 8 probe texts, least cosine 0.")
    assert [log["event"] for log in logs] == ["model.format_inexact"]


def test_float32_alone_is_not_checked() -> None:
    trials = Trials({})
    model, reason = settle((F32,), trials.check, trials.load)
    assert (model.dtype, reason, trials.loaded) == (torch.float32, "exact", [torch.float32])


@pytest.mark.parametrize("formats", [(F16, F32), (F16,)])
def test_a_model_that_is_too_large_to_be_checked(formats: tuple[Format, ...]) -> None:
    trials = Trials({torch.float16: 1.0}, skipped="9 GB in float32")
    model, reason = settle(formats, trials.check, trials.load)
    assert (model.dtype, trials.loaded) == (torch.float16, [torch.float16])
    assert reason == "fine; not checked: 9 GB in float32"


def test_no_memory_for_float32() -> None:
    trials = Trials({torch.float16: 1.0})
    trials.fails = torch.OutOfMemoryError("CUDA out of memory")
    assert settle((F16, F32), trials.check, trials.load)[1] == "fine; not checked: no memory for the weights in float32"
    trials.fails = ModelLoadError("weights are missing")
    with pytest.raises(ModelLoadError, match="weights are missing"):  # and is not taken for a fault of the format
        settle((F16, F32), trials.check, trials.load)


@pytest.mark.parametrize(("off", "loaded"), [(0.001, torch.float16), (1.0, torch.float32)])
def test_a_verdict_is_good_for_the_next_start(tmp_path: Path, off: float, loaded: torch.dtype) -> None:
    first = Trials({torch.float16: off}, folder=tmp_path)
    expected = settle((F16, F32), first.check, first.load)[1]
    second = Trials({}, folder=tmp_path)
    second.fails = AssertionError("nothing is compared again")
    assert settle((F16, F32), second.check, second.load)[1] == expected
    assert second.loaded == [loaded]


def test_a_warning_comes_with_every_start(tmp_path: Path) -> None:
    for n_loaded in (2, 1):
        trials = Trials({torch.float16: 1.0}, folder=tmp_path)
        with structlog.testing.capture_logs() as logs:
            settle((F16,), trials.check, trials.load)
        assert len(trials.loaded) == n_loaded
        assert [log["event"] for log in logs] == ["model.format_inexact"]


# Whole models


def fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bfloat16_feature", lambda: "AMX")
    monkeypatch.setattr(hardware, "bfloat16_gain", lambda: 3.0)


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "formats", lambda *_: (F16, BF16, F32))


def load(model: Path | str, **others: Any) -> Model:
    given = {"device": "cpu", "threads": 1, "keep_measurements": False, **others}
    return Model.load(Settings(model=str(model), **given))


def change(folder: Path, by: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    file = folder / "model.safetensors"
    weights = load_file(file)
    by(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def scale_inside(weights: dict[str, torch.Tensor], factor: float) -> None:
    """Values between two layers far outside of float16's range, and as before behind them."""
    weights["encoder.layer.0.intermediate.dense.weight"] *= factor
    weights["encoder.layer.0.intermediate.dense.bias"] *= factor
    weights["encoder.layer.0.output.dense.weight"] /= factor


def sharp(weights: dict[str, torch.Tensor]) -> None:
    """Attention to one token alone: which one, hangs on what is rounded."""
    for layer in (0, 1):
        weights[f"encoder.layer.{layer}.attention.self.query.weight"] *= 100


def test_auto_takes_the_real_model_in_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fast_in_bfloat16(monkeypatch)
    loading_it = partial(load, "all-MiniLM-L6-v2", max_model_len=64, keep_measurements=True, measured_dir=tmp_path)
    with structlog.testing.capture_logs() as logs:
        first = loading_it()
    expected = r"CPU with AMX, 3\.0 times as fast as float32; 16 probe texts, least cosine 0\.999\d\d"
    assert first.dtype == "bfloat16"
    assert re.fullmatch(expected, first.dtype_reason)
    (said,) = [log for log in logs if log["event"] == "model.loaded"]
    assert (said["dtype"], said["dtype_reason"]) == ("bfloat16", first.dtype_reason)
    monkeypatch.setattr(Model, "_exact_vectors", None)  # it is not loaded in float32 again
    assert loading_it().dtype_reason == first.dtype_reason


def test_values_that_outgrow_float16(monkeypatch: pytest.MonkeyPatch, tiny_bert: MakeModel) -> None:
    as_on_cuda(monkeypatch)
    folder = tiny_bert()
    assert load(folder).dtype == "float16"
    model = load(change(folder, lambda weights: scale_inside(weights, 1e6)))
    assert model.dtype in ("bfloat16", "float32")
    assert "not float16: the first forward pass in float16 gave values that are not numbers" in model.dtype_reason


def test_bfloat16_is_next_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A good model that only its values keep out of float16."""
    as_on_cuda(monkeypatch)
    read = Source.modules

    def modules(source: Source, dtype: torch.dtype) -> Mapping[str, torch.nn.Module]:
        found = read(source, dtype)
        weights = dict(found[""].named_parameters())
        with torch.no_grad():
            scale_inside(weights, 2.0**20)  # type: ignore[arg-type]  # parameters are tensors
        return found

    monkeypatch.setattr(Source, "modules", modules)
    model = load("all-MiniLM-L6-v2", max_model_len=64)
    assert model.dtype == "bfloat16"
    assert re.search(r"; not float16: .*not numbers.*; 16 probe texts, least cosine 0\.999\d\d$", model.dtype_reason)


def test_a_model_that_amplifies_what_is_rounded(monkeypatch: pytest.MonkeyPatch, tiny_bert: MakeModel) -> None:
    fast_in_bfloat16(monkeypatch)
    model = load(change(tiny_bert(), sharp))
    assert model.dtype == "float32"
    assert re.search(r"not bfloat16: \d+ probe texts, least cosine 0\.\d+ \(.+\), at least 0\.999", model.dtype_reason)


@pytest.mark.parametrize("pooling", list(PoolingName))
def test_texts_go_the_whole_way(tiny_bert: MakeModel, pooling: PoolingName) -> None:
    model = load(tiny_bert(), dtype=Dtype.FLOAT32, pooling=pooling)
    model.head = lambda pooled: pooled.roll(1, dims=1) ** 3
    texts = [PROBES[name] for name in vectors_of(model, alone=True)]
    served = [vector for vector in Direct(model, 4096).embed(texts).vectors if vector is not None]
    for alone in (True, False):
        ours = [*vectors_of(model, alone=alone).values()]
        assert agreement(ours, served).error < 1e-5


def test_texts_that_read_the_same_count_once(tiny_bert: MakeModel) -> None:
    model = load(tiny_bert(), dtype=Dtype.FLOAT32, max_model_len=3)
    read = [model.tokenizer.encode([text], truncate_to=3).ids.tolist() for text in PROBES.values()]
    assert len(vectors_of(model, alone=True)) == len({tuple(ids) for ids in read}) < len(PROBES)


@pytest.mark.parametrize(
    ("limit", "free", "expected"),
    [
        (4 * 10**9, 10**9, ""),
        (4 * 10**9, None, ""),
        (10**6, 10**9, r"0\.1 GB in float32, --dtype-check-limit-bytes is 1000000"),
        (4 * 10**9, 10**8, r"0\.1 GB in float32, 0\.1 GB of memory free on cpu"),
        (0, 10**9, "--dtype-check-limit-bytes is 0"),
    ],
)
def test_what_is_too_large_to_be_checked(
    monkeypatch: pytest.MonkeyPatch, limit: int, free: int | None, expected: str
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda device: free)
    settings = Settings(model="all-MiniLM-L6-v2", dtype_check_limit_bytes=limit, keep_measurements=False)
    assert re.fullmatch(expected, Source(settings, torch.device("cpu")).unchecked())


@pytest.mark.parametrize(
    ("host", "device", "short"), [(10**8, 10**9, "cpu"), (10**9, 10**8, "cuda"), (10**9, 10**9, "")]
)
def test_a_copy_for_a_gpu_needs_memory_of_the_host_too(
    monkeypatch: pytest.MonkeyPatch, host: int, device: int, short: str
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda place: {"cpu": host, "cuda": device}[place.type])
    source = Source(Settings(model="all-MiniLM-L6-v2", keep_measurements=False), torch.device("cpu"))
    source.device = torch.device("cuda", 0)
    assert source.unchecked() == (f"0.1 GB in float32, 0.1 GB of memory free on {short}" if short else "")


def test_other_vectors_are_another_check(tiny_bert: MakeModel) -> None:
    folder = str(tiny_bert())
    changes: list[dict[str, Any]] = [{}, {"pooling": "max"}, {"normalize": False}, {"max_model_len": 9}]
    sources = [
        Source(Settings(model=folder, keep_measurements=False, **change), torch.device("cpu")) for change in changes
    ]
    assert len({source.check_name for source in sources}) == len(changes)
