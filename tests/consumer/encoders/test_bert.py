"""Small random models of every family that is built like BERT, beside transformers' own modules."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from embedstream.consumer.encoders import bert
from embedstream.consumer.encoders.attention import Kernel, Tuning, attend
from embedstream.consumer.encoders.bert import BertEncoder
from embedstream.consumer.encoders.choice import Wanted, choose_encoder
from embedstream.consumer.encoders.encoder import NOISE
from embedstream.consumer.encoders.layout import Layout
from embedstream.consumer.encoders.linear import Linears
from embedstream.consumer.encoders.padded import Padded
from embedstream.consumer.measured import Conditions, Measured
from embedstream.consumer.model import Model
from embedstream.shared.settings import Settings

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 1,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 80,
}
LONGEST = 64

BUILT_LIKE_BERT = {
    "BERT": transformers.BertConfig(**SIZES),
    "BERT, tanh": transformers.BertConfig(**SIZES, hidden_act="gelu_new"),
    "BERT, tanh of torch": transformers.BertConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "BERT, fast tanh": transformers.BertConfig(**SIZES, hidden_act="gelu_fast"),
    "BERT, relu": transformers.BertConfig(**SIZES, hidden_act="relu"),
    "BERT, one head": transformers.BertConfig(**{**SIZES, "num_attention_heads": 1}),
    "RoBERTa": transformers.RobertaConfig(**SIZES),
    "XLM-RoBERTa": transformers.XLMRobertaConfig(**SIZES),
    "CamemBERT": transformers.CamembertConfig(**SIZES),
    "Data2Vec": transformers.Data2VecTextConfig(**SIZES),
    "ELECTRA": transformers.ElectraConfig(**SIZES, embedding_size=16),
    "ELECTRA, one size": transformers.ElectraConfig(**SIZES, embedding_size=32),
    "ERNIE": transformers.ErnieConfig(**SIZES),
    "ERNIE, tasks": transformers.ErnieConfig(**SIZES, use_task_id=True),
    "DistilBERT": transformers.DistilBertConfig(**DISTILBERT),
    "ALBERT": transformers.AlbertConfig(**SIZES, embedding_size=16),
    "ALBERT, groups": transformers.AlbertConfig(**SIZES, embedding_size=16, num_hidden_groups=2, inner_group_num=2),
}
OTHERS = {
    "decoder": transformers.BertConfig(**SIZES, is_decoder=True),
    "unknown activation": transformers.BertConfig(**SIZES, hidden_act="mish"),
    "MPNet": transformers.MPNetConfig(**SIZES),
    "norm before layers": transformers.RobertaPreLayerNormConfig(**SIZES),
    "XL": transformers.XLMRobertaXLConfig(**SIZES),
    "rotary": transformers.NomicBertConfig(**SIZES),
    "no encoder": transformers.Qwen2Config(**{**SIZES, "num_key_value_heads": 2}),
}


def made(config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model whose every weight counts."""
    torch.manual_seed(0)
    kind: Any = transformers.AutoModel
    module = kind.from_config(config)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
            else:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    result: nn.Module = module.eval().to(dtype)
    return result


def linears(limit_bytes: int = 10**6) -> Linears:
    return Linears(Measured(Conditions("w", "cpu"), None), limit_bytes, measures=False)


def encoder_of(module: nn.Module, limit_bytes: int = 10**6) -> BertEncoder:
    encoder = BertEncoder.of(module, linears(limit_bytes))
    assert encoder is not None
    return encoder


def ids_of(lengths: list[int]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    return np.random.default_rng(0).integers(2, 60, sum(lengths)).astype(np.uint32), np.array(lengths)


def alone(module: nn.Module, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Tensor:
    """(total, dim) what transformers computes for each sequence by itself."""
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    with torch.inference_mode():
        return torch.cat([Padded(module)(row, np.array([len(row)])) for row in rows])


def run(encoder: BertEncoder, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Tensor:
    with torch.inference_mode():
        return encoder(ids, lengths)


@pytest.mark.parametrize("config", BUILT_LIKE_BERT.values(), ids=BUILT_LIKE_BERT)
def test_numbers_are_those_of_the_module(config: transformers.PreTrainedConfig) -> None:
    module = made(config)
    ids, lengths = ids_of([5, 1, 33, LONGEST, 5, 1, 12])
    expected = alone(module, ids, lengths)
    encoder = encoder_of(module)
    torch.testing.assert_close(run(encoder, ids, lengths), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone(module, ids, lengths), expected, rtol=0, atol=0)  # and the module is as it was


@pytest.mark.parametrize(("device", "tokens"), [("cpu", {36}), ("meta", {33})])
def test_only_a_cpu_rounds_batches(device: str, tokens: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def watched(query: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.add(len(query))
        return attend(query, *others, **options)

    monkeypatch.setattr(bert, "attend", watched)
    encoder = encoder_of(made(BUILT_LIKE_BERT["BERT"]).to(device))
    with torch.inference_mode():
        hidden = encoder.run(torch.full((2, 33), 3, device=device), Layout(np.array([33])))
    assert seen == tokens
    assert len(hidden) == 33


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ELECTRA", "DistilBERT", "ALBERT"])
def test_numbers_in_half_formats_differ_by_their_rounding(name: str, dtype: torch.dtype) -> None:
    module = made(BUILT_LIKE_BERT[name], dtype)
    ids, lengths = ids_of([5, 1, 33, LONGEST, 5])
    expected = alone(module, ids, lengths)
    hidden = run(encoder_of(module), ids, lengths)
    assert hidden.dtype == dtype
    assert (hidden - expected).abs().max() <= NOISE[dtype] / 2 * expected.abs().max()


@pytest.mark.parametrize(
    "lengths", [[1], [LONGEST], [1] * 50, [LONGEST, *[1] * 50], [*[1] * 50, LONGEST], [3, 2, 3, 2, 3], [LONGEST] * 20]
)
@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_batches_at_the_edges(name: str, lengths: list[int]) -> None:
    module = made(BUILT_LIKE_BERT[name])
    given = ids_of(lengths)
    torch.testing.assert_close(run(encoder_of(module), *given), alone(module, *given), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("lengths", "rows"), [([33, 8], 44), ([7], 7), ([40, 4], 44), ([1] * 130, 136)])
def test_layers_meet_few_numbers_of_tokens(lengths: list[int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def watched(query: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.add(len(query))
        return attend(query, *others, **options)

    monkeypatch.setattr(bert, "attend", watched)
    module = made(BUILT_LIKE_BERT["BERT"])
    given = ids_of(lengths)
    torch.testing.assert_close(run(encoder_of(module), *given), alone(module, *given), rtol=0, atol=1e-5)
    assert seen == {rows}


def test_padding_within_a_text_has_no_position_of_its_own_in_roberta() -> None:
    module = made(BUILT_LIKE_BERT["RoBERTa"])
    ids, lengths = ids_of([6, 9, 4])
    ids[[0, 3, 9, 14]] = 1
    torch.testing.assert_close(run(encoder_of(module), ids, lengths), alone(module, ids, lengths), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_what_is_built_otherwise_is_left_to_others(config: transformers.PreTrainedConfig) -> None:
    assert BertEncoder.of(made(config), linears()) is None


def test_adapters_are_left_to_others() -> None:
    peft = pytest.importorskip("peft")
    module: Any = made(BUILT_LIKE_BERT["BERT"])
    module.add_adapter(peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    assert BertEncoder.of(module.eval(), linears()) is None


@pytest.mark.parametrize("part", ["extra", "derived", "no bias", "more words"])
def test_a_module_that_somebody_changed_is_left_to_others(part: str) -> None:
    module: Any = made(BUILT_LIKE_BERT["BERT"])
    layer = module.encoder.layer[1]
    match part:
        case "extra":
            layer.register_parameter("gate", nn.Parameter(torch.ones(1)))
        case "derived":
            layer.output.LayerNorm.__class__ = type("Norm", (nn.LayerNorm,), {})
        case "no bias":
            layer.attention.self.key.bias = None
        case "more words":
            module.embeddings.word_embeddings.max_norm = 1.0
    assert BertEncoder.of(module, linears()) is None


def test_weights_lie_in_memory_once() -> None:
    module: Any = made(BUILT_LIKE_BERT["BERT"])
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    encoder_of(module, limit_bytes=0)
    own = [layer.attention.self for layer in module.encoder.layer]
    for attention in own:
        first = attention.query.weight.untyped_storage().data_ptr()
        assert attention.key.weight.untyped_storage().data_ptr() == first
        assert attention.value.weight.untyped_storage().data_ptr() == first
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name].detach(), rtol=0, atol=0)
        assert weight.requires_grad


def test_modules_that_share_weights_still_do() -> None:
    module: Any = made(BUILT_LIKE_BERT["BERT"])
    other = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
    ids, lengths = ids_of([7, 3])
    expected = alone(other, ids, lengths)
    encoder_of(module)
    torch.testing.assert_close(alone(other, ids, lengths), expected, rtol=0, atol=0)
    assert other.encoder.layer[0].attention.self.query.weight is module.encoder.layer[0].attention.self.query.weight


def test_copies_of_weights_keep_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "embedstream.consumer.encoders.linear._times",
        lambda candidates, *_: {way: float(not way.startswith("packed")) for way in candidates},
    )
    module = made(BUILT_LIKE_BERT["BERT"])
    unlimited, limited = linears(), linears(20_000)
    assert BertEncoder.of(module, unlimited) is not None
    encoder = BertEncoder.of(module, limited)
    assert unlimited.packed_bytes == 3 * 4 * (4 * 32 * 32 + 2 * 32 * 48)
    assert 10_000 < limited.packed_bytes <= 20_000
    ids, lengths = ids_of([9, 2])
    assert encoder is not None
    torch.testing.assert_close(run(encoder, ids, lengths), alone(module, ids, lengths), rtol=0, atol=1e-5)


def test_all_that_hangs_on_lengths_is_there_before_the_device_begins() -> None:
    encoder = encoder_of(made(BUILT_LIKE_BERT["RoBERTa"]))
    ids, lengths = ids_of([5, 9, 5])
    layout = Layout(lengths)
    tokens = encoder.tokens(ids, layout)
    assert tokens.shape == (2, 19)
    assert tokens[1].tolist() == [*range(2, 11), *range(2, 7), *range(2, 7)]
    with torch.inference_mode():
        hidden = layout.unpack(encoder.run(torch.from_numpy(tokens), layout))
    torch.testing.assert_close(hidden, run(encoder, ids, lengths), rtol=0, atol=0)


def test_attention_takes_the_kernels_that_are_fastest_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def fastest(*_: Any, heads: int, key_heads: int, head_dim: int) -> Tuning:
        asked.append((heads, head_dim))
        return Tuning(Kernel.MATMUL)

    monkeypatch.setattr("embedstream.consumer.encoders.choice.tuned", fastest)
    module = made(BUILT_LIKE_BERT["BERT"])
    wanted = Wanted(module, LONGEST, Measured(Conditions("w", "cpu"), None), Settings(measure_ms=1))
    encoder = choose_encoder(wanted, *ids_of([4, LONGEST]), follows_longest=False)
    assert isinstance(encoder, BertEncoder)
    assert encoder.tuning == Tuning(Kernel.MATMUL)
    assert asked == [(4, 8)]


def test_minilm_is_computed_by_hand(minilm: Model) -> None:
    assert minilm.encoder.name == "bert"
