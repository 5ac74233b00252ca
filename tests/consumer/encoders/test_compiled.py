"""One compilation takes some ten seconds: these tests share what they compile, on disk and in the process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from embedstream.consumer.encoders.bert import BertEncoder
from embedstream.consumer.encoders.choice import Wanted, choose_encoder
from embedstream.consumer.encoders.compiled import Compiler
from embedstream.consumer.encoders.linear import SIZES, Linears
from embedstream.consumer.encoders.padded import Padded
from embedstream.consumer.measured import Value
from embedstream.shared.settings import Settings

pytestmark = [
    pytest.mark.slow,
    # Of torch itself, when its compiler looks at layers of oneDNN.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
]


class Store:
    """Measurements that were made before: compiled code is faster from some number of tokens on."""

    def __init__(self, least: int | None) -> None:
        self.found: dict[str, Value] = {}
        self._least = least

    def get(self, name: str) -> Value:
        if name.startswith("compiled-") and self._least is not None:
            return [tokens >= self._least for tokens in SIZES]
        return self.found.get(name)

    def put(self, name: str, value: Value) -> None:
        self.found[name] = value


ALWAYS, NEVER = 2, 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def _as_at_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=60,
        max_position_embeddings=80,
    )
    module: torch.nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return module.eval()


def test_a_consumer_compiles_when_it_is_asked_to(module: torch.nn.Module, folder: Path) -> None:
    ids, lengths = np.arange(10, 40), np.array([20, 10])
    for store, asked, name in (
        (Store(ALWAYS), False, "bert"),
        (Store(NEVER), True, "bert"),
        (Store(ALWAYS), True, "bert, compiled"),
    ):
        settings = Settings(compile=asked, compile_cache_dir=folder)
        wanted = Wanted(module, 64, store, settings)
        assert choose_encoder(wanted, ids, lengths, follows_longest=False).name == name
        assert graphs() == (name == "bert, compiled")


def encoder_of(module: torch.nn.Module, folder: Path, store: Store) -> BertEncoder:
    encoder = BertEncoder.of(module, Linears(store, 0), compiles=Compiler(store, folder))
    assert encoder is not None
    return encoder


def graphs() -> int:
    """Pieces of code compiled since the test began."""
    return int(counters["stats"]["unique_graphs"])


def compare(module: torch.nn.Module, encoder: BertEncoder) -> None:
    """With batches of one token up to more than a thousand."""
    random = np.random.default_rng(0)
    for lengths in ([1], [2], [7, 7, 3], [1] * 50 + [64], [64] * 20):
        ids = random.integers(3, 60, sum(lengths))
        with torch.inference_mode():
            ours, theirs = (run(ids, np.array(lengths)) for run in (encoder, Padded(module)))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_all_layers_are_compiled_once_and_batches_compile_nothing(module: torch.nn.Module, folder: Path) -> None:
    encoder = encoder_of(module, folder, Store(ALWAYS))
    assert graphs() == 1
    assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
    errors: list[BaseException] = []

    def serve() -> None:
        """As the device's thread does. What would run uncompiled, because it is not compiled for that, fails here."""
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                compare(module, encoder)
        except BaseException as error:  # noqa: BLE001 (told below)
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert errors == []
    assert graphs() == 1


def test_the_next_start_finds_it_on_disk(module: torch.nn.Module, folder: Path) -> None:
    encoder_of(module, folder, Store(ALWAYS))
    torch._dynamo.reset()
    counters.clear()
    compare(module, encoder_of(module, folder, Store(ALWAYS)))
    found: Counter[str] = Counter()
    for kind in ("inductor", "aot_autograd"):
        found.update(counters[kind])
    assert found["fxgraph_cache_miss"] + found["autograd_cache_miss"] == 0
    assert found["fxgraph_cache_hit"] + found["autograd_cache_hit"] > 0


def test_a_shape_that_is_not_compiled_runs_uncompiled(module: torch.nn.Module, folder: Path) -> None:
    encoder = encoder_of(module, folder, Store(ALWAYS))
    with torch.inference_mode():
        tokens = torch.ones(2, 4, dtype=torch.int64)
        double = torch.compile(torch.add)(tokens, tokens)
    assert (double == 2).all()
    compare(module, encoder)
    assert graphs() == 1


def test_it_is_measured_where_it_pays(module: torch.nn.Module, folder: Path) -> None:
    store = Store(None)
    compare(module, encoder_of(module, folder, store))
    (name,) = (name for name in store.found if name.startswith("compiled-"))
    assert name == "compiled-32x48-gelu"
    found = store.found[name]
    assert isinstance(found, list)
    assert len(found) == len(SIZES)
    assert found[0] is False  # one token would be compiled by itself


def test_what_never_pays_is_not_compiled(module: torch.nn.Module, folder: Path) -> None:
    compare(module, encoder_of(module, folder, Store(NEVER)))
    assert graphs() == 0


def test_without_a_compiler_it_runs_uncompiled(
    module: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    compare(module, encoder_of(module, tmp_path, Store(ALWAYS)))
    assert "compile.failed" in caplog.text
    assert "InvalidCxxCompiler" in caplog.text
