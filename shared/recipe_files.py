"""Reads the recipe of a model from its files: what sentence-transformers wrote, or else what the architecture implies.

What is not understood is an error, never a guess: a vector made another way than the model's authors meant looks just
as good as a right one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ModelLoadError
from .jobs import TruncationSide
from .logs import get_logger
from .models import ModelFiles
from .recipe import Pooling, Recipe
from .settings import Settings

log = get_logger()

_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names the Transformer module's own settings have had, in the order sentence-transformers looks for them."""

_POOLING_FLAG = "pooling_mode_"
_POOLINGS = {
    "cls": Pooling.CLS,
    "cls_token": Pooling.CLS,
    "mean": Pooling.MEAN,
    "mean_tokens": Pooling.MEAN,
    "lasttoken": Pooling.LAST,
}
_MODULES = ("Transformer", "Pooling", "Normalize")
_ARGUMENTS = (
    *("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"),
    *("processing_kwargs", "query_expansion"),
)
"""What a Transformer module may pass on to transformers; each could change the vectors."""
_HARMLESS = {"attn_implementation", "dtype", "torch_dtype", "trust_remote_code", "use_safetensors"}

# Only where nothing in the files says how to pool.
_ENCODERS = frozenset(
    (
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "gte"),
        *("mobilebert", "modernbert", "mpnet", "nomic_bert", "roberta", "roberta-prelayernorm", "xlm-roberta"),
        *("xlm-roberta-xl",),
    )
)
_DECODERS = frozenset(
    (
        *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "olmo", "olmo2"),
        *("opt", "phi", "phi3", "qwen2", "qwen3"),
    )
)
# A table of positions ends somewhere; rotary and relative positions do not. The models of the second set count from
# pad_token_id + 1 (transformers: RobertaEmbeddings.create_position_ids_from_input_ids).
_TABLE_POSITIONS = frozenset(("albert", "bert", "distilbert", "electra", "ernie", "gpt2", "mobilebert"))
_OFFSET_POSITIONS = frozenset(
    ("camembert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_DIMENSION_KEYS = ("hidden_size", "d_model", "dim", "n_embd")
_NO_LIMIT = 10**9  # transformers writes 10^30 for "no limit"


def read_recipe(files: ModelFiles, settings: Settings) -> Recipe:
    """The recipe of a model, the operator's overrides included.

    Args:
        files: where the model is.
        settings: `pooling`, `max_model_len` and `matryoshka_dims` override the files.

    Raises:
        ModelLoadError: a file is missing or damaged, or says something that is not understood.
    """
    modules = _read_modules(files.path)
    folder = transformer_folder(files.path)
    config = _read_object(folder / "config.json")
    own = _read_transformer_config(folder)
    tokenizer = _read_object(folder / "tokenizer_config.json", missing_ok=True)
    pooling_config = _read_object(files.path / modules["Pooling"] / "config.json") if "Pooling" in modules else {}
    pooling, source = _pooling(files.path, modules, pooling_config, config, settings)
    dimension = _dimension(folder, config)
    return Recipe(
        max_length=_max_length(folder, config, own, tokenizer, settings.max_model_len),
        pooling=pooling,
        normalize="Normalize" in modules if modules else True,
        dimension=dimension,
        vocab_size=_required(folder, config, ("vocab_size",)),
        matryoshka_dims=_matryoshka_dims(folder, config, dimension, settings.matryoshka_dims),
        truncation_side=_truncation_side(folder, tokenizer),
        do_lower_case=bool(own.get("do_lower_case", False)),
        pooling_source=source,
    )


def transformer_folder(path: Path) -> Path:
    """Where `config.json`, weights and tokenizer are: the model's folder itself, or `0_Transformer` in old models.

    Raises:
        ModelLoadError: `modules.json` is damaged, or lists modules that are not supported.
    """
    return path / _read_modules(path).get("Transformer", "")


def _read_modules(path: Path) -> dict[str, str]:
    """Class name -> folder of each module; empty without a `modules.json`."""
    file = path / "modules.json"
    if not file.is_file():
        return {}
    listed = _read_json(file)
    modules: dict[str, str] = {}
    try:
        for module in listed:
            package, _, name = str(module["type"]).rpartition(".")
            if name not in _MODULES or package.partition(".")[0] != "sentence_transformers" or name in modules:
                raise ModelLoadError(f"{file}: the module {module['type']!r} is not supported yet")
            modules[name] = _folder_name(file, module["path"])
    except (TypeError, KeyError) as error:
        raise ModelLoadError(f"{file} is not a list of modules with a type and a path") from error
    if tuple(modules) not in (_MODULES[:1], _MODULES[:2], _MODULES, (_MODULES[0], _MODULES[2])):
        raise ModelLoadError(f"{file}: the modules {', '.join(modules)} in this order are not supported yet")
    return modules


def _folder_name(file: Path, value: object) -> str:
    name = PurePosixPath(value) if isinstance(value, str) else None
    if name is None or name.is_absolute() or ".." in name.parts:
        raise ModelLoadError(f"{file}: the path {value!r} does not name a folder beside it")
    return str(name)


def _read_transformer_config(folder: Path) -> dict[str, Any]:
    """The Transformer module's own settings; empty when there are none."""
    file = next((folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file()), None)
    if file is None:
        return {}
    own = _read_object(file)
    expected = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    for key, value in expected.items():
        if own.get(key, value) != value:
            raise ModelLoadError(f"{file}: {key} {own[key]!r} is not supported yet")
    for key in _ARGUMENTS:
        arguments = own.get(key) or {}
        if not isinstance(arguments, dict) or arguments.keys() - _HARMLESS:
            raise ModelLoadError(f"{file}: {key} {arguments!r} is not supported yet")
    return own


def _pooling(
    path: Path, modules: dict[str, str], pooling_config: dict[str, Any], config: dict[str, Any], settings: Settings
) -> tuple[tuple[Pooling, ...], str]:
    if settings.pooling is not None:
        return (Pooling(settings.pooling.value),), "override"
    if not modules:
        pooling = _architecture_pooling(path, config)
        log.warning("model.pooling_assumed", path=str(path), pooling=pooling.value, reason="no modules.json")
        return (pooling,), "architecture default"
    if "Pooling" not in modules:
        raise ModelLoadError(f"{path / 'modules.json'} has no Pooling module; set --pooling")
    file = path / modules["Pooling"] / "config.json"
    modes = _pooling_modes(file, pooling_config)
    if len(modes) > 1:
        raise ModelLoadError(f"{file}: several pooling modes at once ({', '.join(modes)}) are not supported yet")
    if modes[0] not in _POOLINGS:
        known = ", ".join(pooling.value for pooling in Pooling)
        raise ModelLoadError(
            f"{file}: the pooling mode {modes[0]!r} is not supported yet; --pooling may choose another ({known})"
        )
    return (_POOLINGS[modes[0]],), "modules.json"


def _pooling_modes(file: Path, config: dict[str, Any]) -> list[str]:
    """The modes switched on, in the newer form `pooling_mode` or the older one with a flag for each mode."""
    mode = config.get("pooling_mode")
    if mode is None:
        flags = [name for name, value in config.items() if name.startswith(_POOLING_FLAG) and value is True]
        # sentence-transformers takes the mean when no flag is set
        return [name.removeprefix(_POOLING_FLAG) for name in flags] or ["mean"]
    modes = [mode] if isinstance(mode, str) else mode
    if not isinstance(modes, list) or not modes or not all(isinstance(each, str) for each in modes):
        raise ModelLoadError(f"{file}: pooling_mode is {mode!r}, not the name of a mode")
    return modes


def _architecture_pooling(path: Path, config: dict[str, Any]) -> Pooling:
    kind = config.get("model_type")
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if kind in _DECODERS or architecture.endswith("ForCausalLM"):
        return Pooling.LAST
    if kind in _ENCODERS or architecture.endswith("ForMaskedLM"):
        return Pooling.CLS
    raise ModelLoadError(
        f"{path} has no modules.json, and nothing says how a model of type {kind!r} is pooled; set --pooling"
    )


def _max_length(
    folder: Path, config: dict[str, Any], own: dict[str, Any], tokenizer: dict[str, Any], wanted: int | None
) -> int:
    positions = _positions(folder, config)
    table = config.get("model_type") in _TABLE_POSITIONS | _OFFSET_POSITIONS
    # What the authors chose counts, except past the end of a table of positions: there the model fails.
    limits = [_integer(folder / "sentence_bert_config.json", own, "max_seq_length")]
    if limits[0] is None:
        limits = [_integer(folder / "tokenizer_config.json", tokenizer, "model_max_length"), positions]
    elif table:
        limits.append(positions)
    limit = min((each for each in limits if each is not None and 0 < each < _NO_LIMIT), default=None)
    if limit is None and wanted is None:
        raise ModelLoadError(f"the files in {folder} name no longest input; set --max-model-len")
    if limit is not None and wanted is not None and wanted > limit:
        raise ModelLoadError(f"--max-model-len {wanted} is more than the {limit} tokens the model reads")
    return wanted or limit or 0


def _positions(folder: Path, config: dict[str, Any]) -> int | None:
    """The longest sequence the position embeddings were made for."""
    parts = (config, _text_config(config))
    values = (_integer(folder / "config.json", part, key) for part in parts for key in _POSITION_KEYS)
    positions = next((value for value in values if value is not None and value > 0), None)
    if positions is not None and config.get("model_type") in _OFFSET_POSITIONS:
        pad = _integer(folder / "config.json", config, "pad_token_id")
        return positions - (1 if pad is None else pad) - 1
    return positions


def _dimension(folder: Path, config: dict[str, Any]) -> int:
    return _required(folder, config, _DIMENSION_KEYS)


def _matryoshka_dims(
    folder: Path, config: dict[str, Any], dimension: int, wanted: str | None
) -> tuple[int, ...] | None:
    if wanted is None:
        listed = config.get("matryoshka_dimensions") or ()
        if not isinstance(listed, (list, tuple)) or not all(type(size) is int and size > 0 for size in listed):
            raise ModelLoadError(f"{folder / 'config.json'}: matryoshka_dimensions is {listed!r}, not a list of sizes")
        if listed:
            return tuple(listed)
        return None if config.get("is_matryoshka") else ()
    if wanted in ("any", "off"):
        return None if wanted == "any" else ()
    sizes = tuple(int(size) for size in wanted.split(","))
    if max(sizes) > dimension:
        raise ModelLoadError(f"--matryoshka-dims {wanted}: the model's vectors have only {dimension} components")
    return sizes


def _truncation_side(folder: Path, tokenizer: dict[str, Any]) -> TruncationSide:
    side = tokenizer.get("truncation_side", "right")
    if side not in ("left", "right"):
        raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: truncation_side is {side!r}, neither left nor right")
    return TruncationSide.LEFT if side == "left" else TruncationSide.RIGHT


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the text model in the configuration of one that reads more than text."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def _required(folder: Path, config: dict[str, Any], keys: tuple[str, ...]) -> int:
    for part in (config, _text_config(config)):
        for key in keys:
            value = _integer(folder / "config.json", part, key)
            if value is not None and value > 0:
                return value
    raise ModelLoadError(f"{folder / 'config.json'} has none of {', '.join(keys)}")


def _integer(file: Path, fields: dict[str, Any], key: str) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ModelLoadError(f"{file}: {key} is {value!r}, not a number")
    return int(value)


def _read_object(file: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not file.is_file():
        return {}
    value = _read_json(file)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} is damaged: it holds no JSON object")
    return value


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} is damaged: {error}") from error
