"""The models of the contract: tiny random ones that differ in what their files say."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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


PROMPTS = {"query": "the queue ", "passage": "a b ", "nothing": ""}
OTHER_PROMPTS = {"query": "the queue ", "document": "a b "}
TASKS = ("retrieval.query", "sorting")
HEAD_DIM = 12


@dataclass(frozen=True)
class TinyModel:
    """What one model's files say.

    Args:
        pooling: words of the pooling module's configuration.
        include_prompt: of the same.
        normalize: whether there is a Normalize module.
        head: whether there are a Dense layer and a layer norm before it.
        sizes: the setting `matryoshka_dims`; None leaves it to the files.
        all_tokens: the setting `pooling` is `all`.
        chat: whether its tokenizer has a template.
        prompts: of sentence-transformers.
        default_prompt: the name of one, or None.
        adapters: LoRA adapters beside its weights.
        cuts: the side its tokenizer cuts.
        scale: of the last layer's output.
        faults: whether some words make it fail.
        lower: whether its configuration has texts lower-cased, and not its tokenizer.
        names: served names.
    """

    pooling: str | Sequence[str] = "mean"
    include_prompt: bool = True
    normalize: bool = True
    head: bool = False
    sizes: str | None = None
    all_tokens: bool = False
    chat: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    adapters: Sequence[str] = ()
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
    "prompted": TinyModel(chat=True, prompts=PROMPTS, default_prompt="passage", faults=False, names=("prompted",)),
    "headed": TinyModel(
        pooling=("cls", "mean"),
        head=True,
        include_prompt=False,
        prompts=OTHER_PROMPTS,
        sizes="4",
        faults=False,
        names=("headed",),
    ),
    "tasked": TinyModel(prompts={TASKS[0]: "the "}, adapters=TASKS, faults=False, names=("tasked",)),
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
    for name in model.adapters:
        _write_adapter(module, folder / name)
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = [
        "",
        "Pooling",
        *(["Dense", "LayerNorm"] if model.head else []),
        *(["Normalize"] if model.normalize else []),
    ]
    paths = [f"{place}_{kind}" if kind else "" for place, kind in enumerate(kinds)]
    tokens = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **tokens}
    config |= {"mask_token": "[MASK]", "truncation_side": model.cuts}
    if model.chat:
        config["chat_template"] = TEMPLATE
    pooling = {"embedding_dimension": DIM, "pooling_mode": model.pooling, "include_prompt": model.include_prompt}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind or _FIRST}"}
            for place, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ],
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": LENGTH, "do_lower_case": model.lower},
        "tokenizer_config.json": config,
        "config_sentence_transformers.json": {"prompts": model.prompts, "default_prompt_name": model.default_prompt},
    }
    if model.head:
        weight, bias = torch.randn(HEAD_DIM, 2 * DIM), torch.randn(HEAD_DIM)
        activation = "torch.nn.modules.activation.Tanh"
        sizes = {"in_features": 2 * DIM, "out_features": HEAD_DIM, "bias": True, "activation_function": activation}
        files |= {"2_Dense/config.json": sizes, "3_LayerNorm/config.json": {"dimension": HEAD_DIM}}
        _write_weights(folder / paths[2], {"linear.weight": weight, "linear.bias": bias})
        _write_weights(folder / paths[3], {"norm.weight": weight[:, 0].clone(), "norm.bias": bias})
    for path in paths:
        (folder / path).mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


_FIRST = "Transformer"


def _write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")


def _write_adapter(module: BertModel, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(module), lora).save_pretrained(str(folder))
