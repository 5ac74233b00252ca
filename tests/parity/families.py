"""The families of the matrix: how a tiny random model of each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import vocabularies

HIDDEN = 32
MAX_LENGTH = 48
"""Tokens that every model of the matrix reads."""
WINDOW = 8
"""Of sliding attention: far below the longest text."""

_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_GPT = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
_T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_EMBEDDING_GEMMA2 = {
    **_DECODER,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "embedding_dim": 24,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    Args:
        name: as people call it, with what is special about its settings.
        config: class of its configuration; the model is what AutoModel makes of it.
        tokenizer: makes its tokenizer.
        options: of the configuration, beside the sizes and the special tokens.
        dimension: components of a hidden state, as the model gives it out.
        feels_padding: whether hidden states of tokens hang on what follows the text in its batch.
        only_tokenizer: whether its processor, which reads images too, needs packages that texts do not.
        model: class of the model, where it is not that of AutoModel.
        packs: whether its batches are computed without padding.
    """

    name: str
    config: type[PreTrainedConfig]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    options: Mapping[str, Any] = field(default_factory=dict)
    dimension: int = HIDDEN
    feels_padding: bool = False
    only_tokenizer: bool = False
    model: type[PreTrainedModel] | None = None
    packs: bool = True

    @property
    def model_type(self) -> str:
        """As in `config.json`."""
        return self.config.model_type

    def make(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """A random model, the same each time, whose every weight counts: none is zero or one."""
        known = self.options.get("text", self.config)()
        special = {name: getattr(tokenizer, name) for name in _SPECIAL if hasattr(known, name)}
        options = {"vocab_size": len(tokenizer), **special, **self.options}
        text = options.pop("text", None)
        whole: Any = self.config
        config = whole(**options) if text is None else whole(text_config=text(**options))
        torch.manual_seed(0)
        kind: Any = self.model or transformers.AutoModel
        made: PreTrainedModel = kind.from_config(config) if self.model is None else kind(config)
        with torch.no_grad():
            for weight in made.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.3)
                else:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
        return made


def batches_of(family: Family) -> str:
    """How its batches are computed, as docs/models.md has it."""
    if family.packs:
        return "packed"
    return "equal lengths" if family.feels_padding else "padded"


FAMILIES = (
    Family("BERT", transformers.BertConfig, vocabularies.bert, _ENCODER),
    Family("RoBERTa", transformers.RobertaConfig, vocabularies.roberta, {**_ENCODER, "type_vocab_size": 1}),
    Family("XLM-RoBERTa", transformers.XLMRobertaConfig, vocabularies.xlm_roberta, {**_ENCODER, "type_vocab_size": 1}),
    Family("MPNet", transformers.MPNetConfig, vocabularies.mpnet, _ENCODER, packs=False),
    Family(
        "DistilBERT",
        transformers.DistilBertConfig,
        vocabularies.bert,
        {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    Family("ALBERT", transformers.AlbertConfig, vocabularies.albert, {**_ENCODER, "embedding_size": 16}),
    Family("ELECTRA", transformers.ElectraConfig, vocabularies.bert, {**_ENCODER, "embedding_size": 16}),
    Family("CamemBERT", transformers.CamembertConfig, vocabularies.camembert, {**_ENCODER, "type_vocab_size": 1}),
    Family(
        "DeBERTa v2",
        transformers.DebertaV2Config,
        vocabularies.deberta_v2,
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3},
        packs=False,
    ),
    Family(
        "DeBERTa v3",
        transformers.DebertaV2Config,
        vocabularies.deberta_v2,
        {
            **_ENCODER,
            "relative_attention": True,
            "position_buckets": 16,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        packs=False,
    ),
    Family(
        "DeBERTa",
        transformers.DebertaConfig,
        vocabularies.roberta,
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
        packs=False,
    ),
    Family("ERNIE", transformers.ErnieConfig, vocabularies.bert, _ENCODER),
    Family(
        "MobileBERT",
        transformers.MobileBertConfig,
        vocabularies.bert,
        {**_ENCODER, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
        feels_padding=True,
        packs=False,
    ),
    Family(
        "RoBERTa, norm before layers",
        transformers.RobertaPreLayerNormConfig,
        vocabularies.roberta,
        {**_ENCODER, "type_vocab_size": 1},
    ),
    Family(
        "XLM-RoBERTa XL", transformers.XLMRobertaXLConfig, vocabularies.xlm_roberta, {**_ENCODER, "type_vocab_size": 1}
    ),
    Family(
        "X-MOD",
        transformers.XmodConfig,
        vocabularies.xlm_roberta,
        {**_ENCODER, "type_vocab_size": 1, "languages": ["en_XX"], "default_language": "en_XX"},
    ),
    Family(
        "Longformer",
        transformers.LongformerConfig,
        vocabularies.roberta,
        {**_ENCODER, "type_vocab_size": 1, "attention_window": [WINDOW, WINDOW], "max_position_embeddings": 128},
        packs=False,
    ),
    Family(
        "ModernBERT",
        transformers.ModernBertConfig,
        vocabularies.modernbert,
        {**_ENCODER, "num_hidden_layers": 4, "local_attention": 2 * WINDOW},
    ),
    Family("Nomic BERT", transformers.NomicBertConfig, vocabularies.bert, _ENCODER),
    Family("GTE", transformers.GteConfig, vocabularies.xlm_roberta, _ENCODER),
    Family("EuroBERT", transformers.EuroBertConfig, vocabularies.eurobert, _DECODER),
    Family("Jina embeddings v3", transformers.JinaEmbeddingsV3Config, vocabularies.xlm_roberta, _ENCODER),
    Family(
        "EmbeddingGemma 2",
        transformers.EmbeddingGemma2Config,
        vocabularies.gemma,
        {**_EMBEDDING_GEMMA2, "text": transformers.EmbeddingGemma2TextConfig},
        dimension=24,
        only_tokenizer=True,
    ),
    Family(
        "EmbeddingGemma 2, text part",
        transformers.EmbeddingGemma2TextConfig,
        vocabularies.gemma,
        _EMBEDDING_GEMMA2,
        dimension=24,
    ),
    Family("Qwen2", transformers.Qwen2Config, vocabularies.qwen2, _DECODER),
    Family("Qwen2, both directions", transformers.Qwen2Config, vocabularies.qwen2, {**_DECODER, "is_causal": False}),
    Family("Qwen3", transformers.Qwen3Config, vocabularies.qwen2, {**_DECODER, "head_dim": 16}),
    Family(
        "Mistral, sliding window",
        transformers.MistralConfig,
        vocabularies.mistral,
        {**_DECODER, "sliding_window": WINDOW},
    ),
    Family("Llama", transformers.LlamaConfig, vocabularies.llama, _DECODER),
    Family("Phi", transformers.PhiConfig, vocabularies.qwen2, _DECODER),
    Family("OLMo", transformers.OlmoConfig, vocabularies.qwen2, _DECODER),
    Family("OLMo 2", transformers.Olmo2Config, vocabularies.qwen2, _DECODER),
    Family("Gemma", transformers.GemmaConfig, vocabularies.gemma, {**_DECODER, "head_dim": 8}),
    Family(
        "Gemma 2, sliding window and soft cap",
        transformers.Gemma2Config,
        vocabularies.gemma,
        {**_DECODER, "head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
    ),
    Family(
        "Gemma 3, sliding window",
        transformers.Gemma3TextConfig,
        vocabularies.gemma,
        {**_DECODER, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family(
        "EmbeddingGemma (Gemma 3, both directions)",
        transformers.Gemma3TextConfig,
        vocabularies.gemma,
        {
            **_DECODER,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "use_bidirectional_attention": True,
        },
    ),
    Family("Phi-3", transformers.Phi3Config, vocabularies.llama, _DECODER),
    Family("GPT-2", transformers.GPT2Config, vocabularies.qwen2, _GPT),
    Family("GPT-J", transformers.GPTJConfig, vocabularies.qwen2, {**_GPT, "rotary_dim": 4}, packs=False),
    Family(
        "GPT-Neo, sliding window",
        transformers.GPTNeoConfig,
        vocabularies.qwen2,
        {
            "hidden_size": HIDDEN,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
        packs=False,
    ),
    Family("GPT-NeoX", transformers.GPTNeoXConfig, vocabularies.qwen2, _ENCODER),
    Family(
        "OPT, projected",
        transformers.OPTConfig,
        vocabularies.roberta,
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
        },
        dimension=24,
    ),
    Family(
        "T5, encoder",
        transformers.T5Config,
        vocabularies.t5,
        _T5,
        model=transformers.T5ForConditionalGeneration,
        packs=False,
    ),
    Family(
        "mT5, encoder",
        transformers.MT5Config,
        vocabularies.t5,
        _T5,
        model=transformers.MT5EncoderModel,
        packs=False,
    ),
    Family(
        "umT5, encoder",
        transformers.UMT5Config,
        vocabularies.t5,
        _T5,
        model=transformers.UMT5EncoderModel,
        packs=False,
    ),
)
