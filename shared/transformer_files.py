"""The Transformer module's own settings, under any of the names that their file has had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import refusals
from .errors import ModelLoadError
from .json_files import boolean, exists, integer, read_object, shown

_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""In the order in which sentence-transformers looks for them; the first that says anything counts."""

_ARGUMENTS = ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs")
"""What the module passes on to transformers when it loads the model; all but the harmless could change the vectors."""
_HARMLESS = frozenset(
    (
        *("add_pooling_layer", "attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "padding_side"),
        *("torch_dtype", "trust_remote_code", "use_cache", "use_fast", "use_safetensors"),
        *("cache_dir", "local_files_only", "revision", "subfolder", "token"),  # of whoever loads it
    )
)
_FIXED = {"module_output_name": "token_embeddings"}
_EMPTY = ("query_length", "document_length", "query_expansion", "tokenizer_name_or_path")
"""Settings that would treat queries unlike documents, or read the tokenizer from elsewhere."""
_FOLLOWED = ("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "processing_kwargs")
_WITHOUT_EFFECT = ("unpad_inputs",)
_OF_TEXT = ("common", "text")
"""Parts of `processing_kwargs` that change how a text becomes tokens; the others are for images and sound."""
_PLAIN = {"method": "forward", "method_output_name": "last_hidden_state"}


@dataclass(frozen=True, slots=True)
class TransformerSettings:
    """What the module's file says.

    Args:
        file: where it is; where the first would be if there is none.
        max_length: longest sequence in tokens, or None.
        do_lower_case: whether texts are lower-cased first.
    """

    file: Path
    max_length: int | None = None
    do_lower_case: bool = False


def read_transformer_settings(folder: Path) -> TransformerSettings:
    """The settings of the transformer in a folder.

    Raises:
        ModelLoadError: the file is damaged, or says something that is not understood.
    """
    if exists(folder / "adapter_config.json"):
        raise ModelLoadError(
            f"{folder / 'adapter_config.json'}: the model is an adapter (PEFT) over another one; merge the two with "
            "peft's merge_and_unload, and save the result with sentence-transformers"
        )
    for file in (folder / name for name in _FILES):
        own = read_object(file, missing_ok=True)
        if own:
            return _settings(file, own)
    return TransformerSettings(folder / _FILES[0])


def _settings(file: Path, own: dict[str, Any]) -> TransformerSettings:
    known = (*_FOLLOWED, *_FIXED, *_EMPTY, *_WITHOUT_EFFECT, *_ARGUMENTS)
    for key, value in own.items():
        if key in _FIXED and value not in (None, _FIXED[key]):
            raise ModelLoadError(f"{file}: {key} is {shown(value)}; only {_FIXED[key]} is supported")
        if key not in known or (key in _EMPTY and value is not None):
            raise ModelLoadError(f"{file}: the setting {shown(key)} ({shown(value)}) is not supported")
    task = own.get("transformer_task", "feature-extraction")
    if (what := refusals.of_task(task if isinstance(task, str) else ascii(task))) is not None:
        raise ModelLoadError(f"{file}: by its transformer_task {shown(task)} the model is {what}")
    _check_text(file, own)
    lower = boolean(file, own, "do_lower_case", default=False)
    return TransformerSettings(file, _arguments(file, own) or integer(file, own, "max_seq_length"), lower)


def _arguments(file: Path, own: dict[str, Any]) -> int | None:
    """Refuse what changes the model; the longest sequence may be among what is passed to the tokenizer."""
    longest = None
    for key in _ARGUMENTS:
        arguments = own.get(key) or {}
        if not isinstance(arguments, dict):
            raise ModelLoadError(f"{file}: {key} is {shown(arguments)}, not a table")
        rest = arguments.keys() - _HARMLESS
        if key in ("tokenizer_args", "processor_kwargs"):
            rest -= {"model_max_length"}
            longest = integer(file, arguments, "model_max_length") or longest
        if rest:
            raise ModelLoadError(f"{file}: {shown(', '.join(sorted(rest)))} in {key} is not supported")
    return longest


def _check_text(file: Path, own: dict[str, Any]) -> None:
    """Texts must go through the tokenizer alone, and come back as the last hidden states."""
    modalities = own.get("modality_config", {"text": _PLAIN})
    if not isinstance(modalities, dict) or "message" in modalities or not _plain(modalities.get("text")):
        raise ModelLoadError(
            f"{file}: modality_config is {shown(modalities)}; only models that read texts as they are, and not as chat "
            "messages, are supported"
        )
    processing = own.get("processing_kwargs") or {}
    if not isinstance(processing, dict) or any(processing.get(part) for part in _OF_TEXT):
        raise ModelLoadError(f"{file}: processing_kwargs {shown(processing)} is not supported")


def _plain(text: object) -> bool:
    return isinstance(text, dict) and {key: text.get(key) for key in _PLAIN} == _PLAIN
