"""Models for the tests: tiny random ones in a sentence-transformers layout, the real all-MiniLM-L6-v2, and a toy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedModel, Qwen2Config, Qwen2Model

from embedstream.consumer.model import Model
from embedstream.shared.connections import connect, create_group
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.settings import Dtype, Settings

from .fleet import Fleet

_END = "<|endoftext|>"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm() -> Model:
    """all-MiniLM-L6-v2 in float32."""
    return Model.load(Settings(model="all-MiniLM-L6-v2", dtype=Dtype.FLOAT32, device="cpu", threads=1))


@pytest.fixture
async def fleet(redis_url: str, keys: Keys, wordpiece_json: str) -> AsyncIterator[Fleet]:
    """The lanes of a toy model, without consumers yet."""
    redis = connect(redis_url)
    for lane in LANES:
        await create_group(redis, keys.lane(lane), GROUP)
    await redis.xadd(keys.reply("me"), {"p": ""})
    yield Fleet(redis, redis_url, keys, wordpiece_json)
    await redis.aclose()


@pytest.fixture
def tiny_bert(tmp_path: Path, wordpiece_json: str) -> Callable[..., Path]:
    """Makes a random BERT of 32 components: `tiny_bert(pooling="mean", normalize=True)`."""

    def make(pooling: str = "mean", *, normalize: bool = True, max_length: int = 48) -> Path:
        folder = tmp_path / f"bert-{pooling}-{normalize}"
        tokenizer: Tokenizer = Tokenizer.from_str(wordpiece_json)
        torch.manual_seed(0)
        module = BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                vocab_size=tokenizer.get_vocab_size(),
                max_position_embeddings=64,
                initializer_range=0.5,  # at 0.02 all vectors of a random model are nearly equal
                pad_token_id=0,
            )
        )
        _save(folder, module, tokenizer, pooling, normalize=normalize)
        _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
        _write(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 64,
                "pad_token": "[PAD]",
                "unk_token": "[UNK]",
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "mask_token": "[MASK]",
            },
        )
        return folder

    return make


@pytest.fixture
def tiny_decoder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a random Qwen2 of 32 components: `tiny_decoder(pooling="lasttoken", normalize=True)`."""

    def make(pooling: str = "lasttoken", *, normalize: bool = True) -> Path:
        folder = tmp_path / f"decoder-{pooling}-{normalize}"
        tokenizer = _byte_pairs()
        torch.manual_seed(0)
        module = Qwen2Model(
            Qwen2Config(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                vocab_size=tokenizer.get_vocab_size(),
                max_position_embeddings=64,
                initializer_range=0.5,
                pad_token_id=tokenizer.token_to_id(_END),
            )
        )
        _save(folder, module, tokenizer, pooling, normalize=normalize)
        _write(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 64,
                "pad_token": _END,
                "eos_token": _END,
            },
        )
        return folder

    return make


def _byte_pairs() -> Tokenizer:
    """One token for each byte, and the end token that Qwen's embedding models put behind each text."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer: Tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([_END])
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {_END}", pair=f"$A {_END} $B {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    return tokenizer


def _save(folder: Path, module: PreTrainedModel, tokenizer: Tokenizer, pooling: str, *, normalize: bool) -> None:
    module.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    package = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"{package}.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )
    _write(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": pooling})
    (folder / "2_Normalize").mkdir()


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
