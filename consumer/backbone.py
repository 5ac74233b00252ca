"""The bare transformer of a model: found, loaded from safetensors, and whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from embedstream.shared.errors import EmbedstreamError, ModelLoadError
from embedstream.shared.logs import get_logger

log = get_logger()

_ENCODERS = frozenset(("mt5", "t5", "umt5"))
POOLER = "pooler."  # weights of a head whose output nothing here reads


def load_backbone(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The bare transformer in evaluation mode, of an encoder-decoder the encoder.

    Args:
        folder: with `config.json` and `model.safetensors`.
        device: where it goes.
        dtype: of its weights.

    Raises:
        ModelLoadError: files missing or damaged, weights of another model, or an architecture transformers does not
            know.
    """
    _check_weight_files(folder)
    own_code = ""
    try:
        written, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        own_code = _own_code(written)
        _check_type(folder, written, own_code)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        module, report = _kind(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them in plainer words than the exception
            **({"add_pooling_layer": False} if _takes_pooling_layer(config) else {}),
        )
        _check_report(folder, module, report, own_code)
        if own_code:
            log.warning("model.own_code_left_out", code=own_code, used=type(module).__name__)
        _keep_no_cache(module.config)
        return module.eval().to(device)
    except EmbedstreamError:
        raise
    except SafetensorError as error:
        raise ModelLoadError(
            f"the model in {folder} cannot be loaded: its weights are damaged or not all there ({first_line(error)}); "
            "fetch them again"
        ) from error
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds
        raise ModelLoadError(
            f"the model in {folder} cannot be loaded: {first_line(error)}{_never_run(own_code)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no advice on training or on tensors that are left out on purpose."""
    logging: Any = transformers.logging  # not annotated
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an exception says, without the advice that some libraries add below."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    announces = lines[0].endswith(":") and len(lines) > 1  # what stands below it
    return f"{lines[0]} {lines[1].strip()}" if announces else lines[0]


def _check_weight_files(folder: Path) -> None:
    """Say in plain words what transformers would say in ten lines."""
    if any(folder.glob("model*.safetensors")) or any(folder.glob("model*.safetensors.index.json")):
        return
    pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
    if pickled is not None:
        raise ModelLoadError(
            f"{folder} has its weights as {pickled}, a pickle, which is never loaded; it needs model.safetensors, "
            "which sentence-transformers writes when it loads and saves the model"
        )
    raise ModelLoadError(f"{folder} has no weights: model.safetensors is missing")


def _own_code(written: Mapping[str, Any]) -> str:
    """The class that the model's own code would compute it with, or "" for one of transformers."""
    classes = written.get("auto_map") or {}
    return str(classes.get("AutoModel") or next(iter(classes.values()), "")) if isinstance(classes, dict) else ""


def _never_run(own_code: str) -> str:
    return f"; its own code, {own_code}, is never run" if own_code else ""


def _check_type(folder: Path, written: Mapping[str, Any], own_code: str) -> None:
    kind = written.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelLoadError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} knows no models of type {kind!r}"
            + _never_run(own_code)
        )


def _kind(config: Any) -> Any:
    """The class that loads it: what has an encoder and a decoder embeds by its encoder, as in sentence-transformers.

    Raises:
        ModelLoadError: an encoder-decoder of another kind.
    """
    if config.model_type in _ENCODERS:  # whose configuration says so or not: an encoder saved alone says it is no pair
        return transformers.AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise ModelLoadError(
            f"encoder-decoder models of type {config.model_type} are not supported; of such models the encoders of "
            "T5, mT5 and umT5 are"
        )
    return transformers.AutoModel


def _takes_pooling_layer(config: Any) -> bool:
    """Whether the class has a switch for its pooler; without it transformers makes up weights for a missing one."""
    chosen = MODEL_MAPPING.get(type(config), None)
    classes = chosen if isinstance(chosen, (tuple, list)) else (chosen,)
    return all(kind is not None and "add_pooling_layer" in inspect.signature(kind).parameters for kind in classes)


def _check_report(folder: Path, module: torch.nn.Module, report: dict[str, Any], own_code: str) -> None:
    """Every tensor must have come from the file: transformers makes up what it does not find."""
    name = type(module).__name__
    odd = sorted(report["mismatched_keys"])
    if odd:
        tensor, stored, wanted = odd[0]
        raise ModelLoadError(
            f"the weights in {folder} are not those of its config.json: {tensor} is {_shape(stored)} there, and "
            f"{_shape(wanted)} by the configuration" + (f"; {len(odd)} tensors differ" if len(odd) > 1 else "")
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(POOLER))
    if not missing:
        return
    unused = sorted(key for key in report["unexpected_keys"] if not key.startswith(POOLER))
    others = f"; it has others, such as {unused[0]}" if unused else ""
    raise ModelLoadError(
        f"the weights in {folder} lack {len(missing)} tensors of {name}, such as {missing[0]}{others}"
        + _never_run(own_code)
    )


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) or "a number"


def _keep_no_cache(config: Any) -> None:
    """A decoder would keep keys and values that nothing reads."""
    config.use_cache = False
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            _keep_no_cache(part)
