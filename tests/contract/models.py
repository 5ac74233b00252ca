"""The models of the contract: tiny random ones that differ in what their files say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.normalizers import BertNormalizer
from transformers import BertConfig, BertModel

DIM = 32
LENGTH = 48
"""Longest input in tokens, [CLS] and [SEP] included."""
FAIL, NOT_FINITE, SLOW = "!", "?", "."
"""Words with a will: the pass raises, the vector is not finite, the pass takes half a second."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ style | default('') }}{% endfor %}"
    "{% if add_generation_prompt %}queue{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """What one model's files say.

    Args:
        pooling: word of the pooling module's configuration.
        normalize: whether there is a Normalize module.
        sizes: the setting `matryoshka_dims`; None leaves it to the files.
        all_tokens: the setting `pooling` is `all`.
        chat: whether its tokenizer has a template, and sentence-transformers a prompt for it.
        cuts: the side its tokenizer cuts.
        scale: of the last layer's output.
        faults: whether some words make it fail.
        lower: whether its configuration has texts lower-cased, and not its tokenizer.
        names: served names.
    """

    pooling: str = "mean"
    normalize: bool = True
    sizes: str | None = None
    all_tokens: bool = False
    chat: bool = False
    cuts: str = "right"
    scale: float = 1.0
    faults: bool = True
    lower: bool = False
    names: Sequence[str] = ("tiny", "owner/tiny")


MODELS = {
    "tiny": TinyModel(sizes="4,8,16"),
    "raw": TinyModel(pooling="cls", normalize=False, scale=1e6, lower=True, names=("raw",)),
    "any": TinyModel(sizes="any", chat=True, cuts="left", faults=False, names=("any",)),
    "all": TinyModel(all_tokens=True, names=("all",)),
}


def write(model: TinyModel, tokenizer_json: str, folder: Path) -> Path:
    """Put a model's files into a folder, in the layout of sentence-transformers."""
    tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.decoder = WordPiece(cleanup=False)
    if model.lower:
        tokenizer.normalizer = BertNormalizer(lowercase=False)
    torch.manual_seed(0)
    module = BertModel(
        BertConfig(
            hidden_size=DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=64,
            initializer_range=0.5,  # at 0.02 all vectors of a random model are nearly equal
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        module.get_parameter("encoder.layer.1.output.LayerNorm.weight").mul_(model.scale)
    module.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if model.normalize else []),
    ]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    tokens = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **tokens}
    config |= {"mask_token": "[MASK]", "truncation_side": model.cuts}
    if model.chat:
        config["chat_template"] = TEMPLATE
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"embedding_dimension": DIM, "pooling_mode": model.pooling},
        "sentence_bert_config.json": {"max_seq_length": LENGTH, "do_lower_case": model.lower},
        "tokenizer_config.json": config,
    }
    if model.chat:
        files["config_sentence_transformers.json"] = {"prompts": {"query": "the the "}, "default_prompt_name": "query"}
    (folder / "2_Normalize").mkdir()
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder
