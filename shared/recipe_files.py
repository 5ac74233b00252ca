"""Reads the recipe of a model from its files: what sentence-transformers wrote, or else what the architecture implies.

What is not understood is an error, never a guess: a vector made another way than the model's authors meant looks just
as good as a right one. `docs/models.md` says of each file what is read of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .architectures import (
    check_architecture,
    default_pooling,
    dimension_keys,
    has_position_table,
    positions,
    text_config,
)
from .errors import ModelLoadError
from .head_files import Cut, Normalize, Step, read_steps, size_after
from .json_files import boolean, exists, integer, read_object, shown, size
from .logs import get_logger
from .model_manifest import ModelManifest
from .models import ModelFiles
from .module_files import Modules, read_modules
from .prompt_files import read_model_settings
from .recipe import Pooling, Recipe
from .settings import Settings
from .transformer_files import TransformerSettings, read_transformer_settings

log = get_logger()

_POOLING_FLAG = "pooling_mode_"
_POOLINGS = {
    "cls": Pooling.CLS,
    "max": Pooling.MAX,
    "mean": Pooling.MEAN,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "weightedmean": Pooling.WEIGHTED_MEAN,
    "lasttoken": Pooling.LAST,
}
_OLD_FLAGS = {
    "cls_token": Pooling.CLS,
    "max_tokens": Pooling.MAX,
    "mean_tokens": Pooling.MEAN,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "lasttoken": Pooling.LAST,
}
"""What the older form of the file has a flag for, in the order in which the vectors are put side by side."""
_NO_LIMIT = 10**9  # transformers writes 10^30 for "no limit"
_INSTRUCTORS = ("hkunlp/instructor-base", "hkunlp/instructor-large", "hkunlp/instructor-xl")
"""Their files do not say that prompts are not pooled; sentence-transformers knows them by name."""


def read_recipe(files: ModelFiles, settings: Settings) -> Recipe:
    """The recipe of a model, the operator's overrides included; all of it but what the tokenizer and adapters say.

    Args:
        files: where the model is.
        settings: `pooling`, `normalize`, `default_prompt_name`, `max_model_len` and `matryoshka_dims` override the
            files; `strict_recipe` refuses to pool by what is usual.

    Raises:
        ModelLoadError: a file is missing or damaged, or says something that is not understood or not served.
    """
    modules = read_modules(files.path)
    folder = modules.transformer
    file = folder / "config.json"
    own = read_transformer_settings(folder)
    config = read_object(file)
    if not modules.listed:
        check_architecture(file, config)
        _warn_of_chat_template(folder)
    tokenizer = read_object(folder / "tokenizer_config.json", missing_ok=True)
    whole = read_model_settings(files.path, config, settings.default_prompt_name, listed=modules.listed)
    pooling, include_prompt, source = _pooling(modules, file, config, settings)
    token_dimension = _required(file, config, dimension_keys(config))
    steps, normalize = _steps(modules, whole.truncate_dim, pooling, token_dimension)
    dimension = size_after(steps, len(pooling) * token_dimension, modules.file)
    return Recipe(
        max_length=_max_length(folder, config, own, tokenizer, settings.max_model_len),
        pooling=pooling,
        normalize=normalize if settings.normalize is None else settings.normalize,
        dimension=dimension,
        vocab_size=_required(file, config, ("vocab_size",)),
        matryoshka_dims=_matryoshka_dims(file, config, dimension, settings.matryoshka_dims),
        do_lower_case=own.do_lower_case,
        token_dimension=0 if token_dimension == dimension else token_dimension,
        prompts=whole.prompts,
        default_prompt=whole.default_prompt,
        include_prompt=include_prompt and not _is_instructor(files, settings),
        similarity=whole.similarity,
        head=", ".join(map(str, steps)),
        pooling_source=source,
    )


def read_head(files: ModelFiles, recipe: Recipe) -> tuple[Step, ...]:
    """What follows the pooling, without the last scaling to unit length, which `recipe.normalize` stands for.

    Args:
        files: where the model is.
        recipe: the one of these files.

    Raises:
        ModelLoadError: as for `read_recipe`.
    """
    modules = read_modules(files.path)
    whole = read_model_settings(files.path, {}, "", listed=modules.listed)
    return _steps(modules, whole.truncate_dim, recipe.pooling, recipe.size(per_token=True))[0]


def _is_instructor(files: ModelFiles, settings: Settings) -> bool:
    fetched = ModelManifest.read(files.path)
    return settings.model in _INSTRUCTORS or (fetched is not None and fetched.source in _INSTRUCTORS)


def transformer_folder(path: Path) -> Path:
    """Where `config.json`, weights and tokenizer are: the model's folder itself, or `0_Transformer` in old models.

    Raises:
        ModelLoadError: `modules.json` is damaged, or lists modules that are not supported.
    """
    return read_modules(path).transformer


def _steps(
    modules: Modules, truncate_dim: int | None, pooling: tuple[Pooling, ...], token_dimension: int
) -> tuple[tuple[Step, ...], bool]:
    """(what is done after the pooling, whether the result is scaled to unit length)."""
    steps = read_steps(modules.head)
    normalize = not modules.listed  # the direction is that of sentence-transformers, which does not scale these
    if steps and isinstance(steps[-1], Normalize):
        steps, normalize = steps[:-1], True
    if pooling == (Pooling.ALL,):
        return (), normalize  # vectors of tokens are those before the pooling
    if truncate_dim is not None and truncate_dim < size_after(steps, len(pooling) * token_dimension, modules.file):
        # sentence-transformers cuts last, and does not scale again
        steps, normalize = (*steps, *([Normalize()] if normalize else []), Cut(truncate_dim)), False
    return steps, normalize


def _pooling(
    modules: Modules, config_file: Path, config: dict[str, Any], settings: Settings
) -> tuple[tuple[Pooling, ...], bool, str]:
    """(ways, whether the prompt is pooled, where that was found)."""
    file = modules.pooling.file if modules.pooling is not None else modules.file
    fields = read_object(file) if modules.pooling is not None else {}
    include_prompt = boolean(file, fields, "include_prompt", default=True)
    if settings.pooling is not None:
        return (Pooling(settings.pooling.value),), include_prompt, "override"
    if modules.pooling is not None:
        return _pooling_modes(file, fields), include_prompt, "modules.json"
    if modules.listed:
        raise ModelLoadError(f"{modules.file} has no Pooling module; set --pooling")
    pooling = default_pooling(config_file, config)
    if settings.strict_recipe:
        raise ModelLoadError(
            f"{config_file.parent} has no modules.json, and --strict-recipe forbids to pool it by what is usual "
            f"({pooling}); say how with --pooling"
        )
    log.warning("model.pooling_assumed", path=str(config_file.parent), pooling=pooling.value, reason="no modules.json")
    return (pooling,), include_prompt, "architecture default"


def _warn_of_chat_template(folder: Path) -> None:
    """Without a `modules.json` sentence-transformers makes a chat message of each text, where there is a template."""
    tokenizer = read_object(folder / "tokenizer_config.json", missing_ok=True)
    if exists(folder / "chat_template.jinja") or tokenizer.get("chat_template"):
        log.warning("model.chat_template_not_used", path=str(folder), reason="no modules.json")


def _pooling_modes(file: Path, config: dict[str, Any]) -> tuple[Pooling, ...]:
    """The ways that are switched on, in the newer form `pooling_mode` or the older one with a flag for each."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = [mode] if isinstance(mode, str) else mode
        if not isinstance(modes, list) or not modes or not all(isinstance(each, str) for each in modes):
            raise ModelLoadError(f"{file}: pooling_mode is {shown(mode)}, not the name of a mode")
        return tuple(_named(file, each, _POOLINGS) for each in modes)
    flags = [name.removeprefix(_POOLING_FLAG) for name, on in config.items() if name.startswith(_POOLING_FLAG) and on]
    chosen = {_named(file, flag, _OLD_FLAGS) for flag in flags}
    # sentence-transformers takes the mean when no flag is set
    return tuple(pooling for pooling in _OLD_FLAGS.values() if pooling in chosen) or (Pooling.MEAN,)


def _named(file: Path, name: str, known: dict[str, Pooling]) -> Pooling:
    if name not in known:
        raise ModelLoadError(
            f"{file}: the pooling mode {shown(name)} is none of sentence-transformers' ({', '.join(_POOLINGS)}); "
            "--pooling may choose another"
        )
    return known[name]


def max_length_source(files: ModelFiles, settings: Settings) -> str:
    """Where the longest input was found, for people: the file and the name in it, or the flag.

    Args:
        files: where the model is.
        settings: those the recipe was read with.

    Raises:
        ModelLoadError: as for `read_recipe`.
    """
    if settings.max_model_len is not None:
        return "--max-model-len"
    folder = transformer_folder(files.path)
    config = read_object(folder / "config.json")
    tokenizer = read_object(folder / "tokenizer_config.json", missing_ok=True)
    limits = _limits(folder, config, read_transformer_settings(folder), tokenizer)
    return min(limits, key=lambda source: limits[source])


def _max_length(
    folder: Path, config: dict[str, Any], own: TransformerSettings, tokenizer: dict[str, Any], wanted: int | None
) -> int:
    limit = min(_limits(folder, config, own, tokenizer).values(), default=None)
    if limit is None and wanted is None:
        raise ModelLoadError(f"the files in {folder} name no longest input; set --max-model-len")
    if limit is not None and wanted is not None and wanted > limit:
        raise ModelLoadError(f"--max-model-len {wanted} is more than the {limit} tokens the model reads")
    return wanted or limit or 0


def _limits(
    folder: Path, config: dict[str, Any], own: TransformerSettings, tokenizer: dict[str, Any]
) -> dict[str, int]:
    """Source -> most tokens. What the authors chose counts, except past the end of a table of positions.

    There the model fails.
    """
    end = positions(folder / "config.json", config)
    limits = {"sentence-transformers' settings (max_seq_length)": own.max_length}
    if own.max_length is None:
        file = folder / "tokenizer_config.json"
        length = integer(file, tokenizer, "model_max_length" if "model_max_length" in tokenizer else "max_len")
        limits = {"tokenizer_config.json (model_max_length)": length, "config.json (positions)": end}
    elif has_position_table(config):
        limits["config.json (positions)"] = end
    return {source: each for source, each in limits.items() if each is not None and 0 < each < _NO_LIMIT}


def _matryoshka_dims(file: Path, config: dict[str, Any], dimension: int, wanted: str | None) -> tuple[int, ...] | None:
    if wanted is None:
        listed = config.get("matryoshka_dimensions") or ()
        if not isinstance(listed, (list, tuple)) or not all(type(size) is int and size > 0 for size in listed):
            raise ModelLoadError(f"{file}: matryoshka_dimensions is {shown(listed)}, not a list of sizes")
        if listed:
            return tuple(size for size in listed if size <= dimension)
        return None if config.get("is_matryoshka") else ()
    if wanted in ("any", "off"):
        return None if wanted == "any" else ()
    sizes = tuple(int(size) for size in wanted.split(","))
    if max(sizes) > dimension:
        raise ModelLoadError(f"--matryoshka-dims {wanted}: the model's vectors have only {dimension} components")
    return sizes


def _required(file: Path, config: dict[str, Any], keys: tuple[str, ...]) -> int:
    for part in (config, text_config(config)):
        for key in keys:
            if part.get(key) is not None:
                return size(file, part, key)
    raise ModelLoadError(f"{file} has none of {', '.join(keys)}")
