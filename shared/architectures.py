"""What is known of architectures: how they are pooled when no file says so, and where their positions end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import refusals
from .errors import ModelLoadError
from .json_files import integer, shown
from .recipe import Pooling

MODEL_TYPES = frozenset(
    (
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "gte"),
        *("longformer", "mobilebert", "modernbert", "mpnet", "nomic_bert", "roberta", "roberta-prelayernorm"),
        *("embedding_gemma2", "embedding_gemma2_text", "jina_embeddings_v3", "mt5", "t5", "umt5", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
        *("embedding_gemma2", "embedding_gemma2_text"),
        *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "olmo", "olmo2"),
        *("opt", "phi", "phi3", "qwen2", "qwen3"),
    )
)
"""Types that are pooled without being told how, encoders before decoders; of others --pooling must say it."""

_CAUSAL = "ForCausalLM"

# A table of positions ends somewhere; rotary and relative positions do not. The models of the second set count from
# pad_token_id + 1 (transformers: RobertaEmbeddings.create_position_ids_from_input_ids).
_TABLE_POSITIONS = frozenset(
    (
        *("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "gpt2", "gpt_neo", "gptj"),
        *("mobilebert", "opt"),
    )
)
_OFFSET_POSITIONS = frozenset(
    ("camembert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)
_DIMENSION_KEYS = ("hidden_size", "d_model", "dim", "n_embd")
_PROJECTED = {
    "embedding_gemma2": "embedding_dim",
    "embedding_gemma2_text": "embedding_dim",
    "opt": "word_embed_proj_dim",
}
"""Types that project each hidden state to another size, which has a key of its own."""
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def check_architecture(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose weights were made for something else than vectors, and that nobody says to pool.

    Args:
        file: its `config.json`, for the message.
        config: what the file holds.

    Raises:
        ModelLoadError: saying what it is, and what to use instead.
    """
    architecture = _architecture(config)
    if (what := refusals.of_architecture(architecture)) is not None:
        raise ModelLoadError(f"{file}: by its architecture {shown(architecture)} the model is {what}")


def default_pooling(file: Path, config: Mapping[str, Any]) -> Pooling:
    """How sentence-transformers pools a model that does not say it: the last token of causal ones, else the mean.

    Args:
        file: its `config.json`, for the message.
        config: what the file holds.

    Raises:
        ModelLoadError: nothing is known of the architecture.
    """
    if _kind(config) not in MODEL_TYPES:
        raise ModelLoadError(
            f"{file.parent} has no modules.json, and nothing is known of how a model of type "
            f"{shown(config.get('model_type'))} is pooled; set --pooling"
        )
    causal = _architecture(config).endswith(_CAUSAL) and bool(config.get("is_causal", True))
    return Pooling.LAST if causal else Pooling.MEAN


def has_position_table(config: Mapping[str, Any]) -> bool:
    """Whether a longer sequence than `positions` makes the model fail."""
    if config.get("position_biased_input", True) is False:  # DeBERTa v3: relative positions alone
        return False
    return _kind(config) in _TABLE_POSITIONS | _OFFSET_POSITIONS


def positions(file: Path, config: dict[str, Any]) -> int | None:
    """The longest sequence the position embeddings were made for; None where the file does not say.

    Raises:
        ModelLoadError: it says something that is no number.
    """
    parts = (config, text_config(config))
    values = (integer(file, part, key) for part in parts for key in _POSITION_KEYS)
    most = next((value for value in values if value is not None and value > 0), None)
    if most is not None and _kind(config) in _OFFSET_POSITIONS:
        pad = integer(file, config, "pad_token_id")
        return most - (1 if pad is None else pad) - 1
    return most


def dimension_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the configuration says how many components the last hidden states have."""
    projected = _PROJECTED.get(_kind(config))
    return _DIMENSION_KEYS if projected is None else (projected, *_DIMENSION_KEYS)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part about the text model in the configuration of one that reads more than text."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type"))


def _architecture(config: Mapping[str, Any]) -> str:
    """The class that the weights were saved from, or ""."""
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""
