"""What there is to say of a loaded model, in the names that settings, logs and recipe use."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

import torch

from embedstream.shared.jobs import MAX_INPUTS, MAX_TOKENS, TruncationSide, longest_input
from embedstream.shared.recipe_files import max_length_source
from embedstream.shared.settings import Settings

from .capacity import Capacity
from .formats import bfloat16_feature
from .model import Model

Facts = dict[str, dict[str, Any]]
"""Section -> name -> a value that JSON has."""

_EXAMPLE = "text"


def facts_of(model: Model, settings: Settings, capacity: Capacity) -> Facts:
    """All that is known of a model without running it.

    Args:
        model: loaded.
        settings: those it was loaded with.
        capacity: of its device.
    """
    card, recipe = model.card, model.recipe
    return {
        "files": {
            "model": card.model,
            "path": str(model.files.path),
            "origin": model.files.origin,
            "revision": card.revision,
        },
        "recipe": {
            "pooling": recipe.pooling_name,
            "pooling_source": recipe.pooling_source,
            "head": recipe.head,
            "normalize": recipe.normalize,
            "dimension": recipe.dimension,
            "token_dimension": recipe.size(per_token=True),
            "matryoshka_dims": _sizes(recipe.matryoshka_dims),
            "max_length": recipe.max_length,
            "max_length_source": max_length_source(model.files, settings),
            "truncation_side": "left" if recipe.truncation_side is TruncationSide.LEFT else "right",
            "do_lower_case": recipe.do_lower_case,
            "special_tokens": _special_tokens(model),
            "prompts": dict(recipe.prompts),
            "default_prompt": recipe.default_prompt,
            "include_prompt": recipe.include_prompt,
            "adapters": list(recipe.adapters),
            "default_adapter": recipe.default_adapter,
            "similarity": recipe.similarity,
            "chat_templates": sorted(card.chat.templates) if card.chat else [],
            "fingerprint": card.fingerprint.hex(),
        },
        "architecture": {
            "class": model.architecture,
            "parameters": model.n_parameters,
            "vocabulary": recipe.vocab_size,
            "tokenizer_ids": model.tokenizer.vocab_size,
        },
        "device": {
            "device": str(model.device),
            **({"name": torch.cuda.get_device_name(model.device)} if model.device.type == "cuda" else {}),
            "dtype": model.dtype,
            "dtype_reason": model.dtype_reason,
            "encoder": model.encoder.name,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "cpu": [torch.backends.cpu.get_cpu_capability(), *filter(None, [bfloat16_feature()])],
            "versions": {
                "python": sys.version.split()[0],
                **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
            },
        },
        "limits": {
            "tokens_of_an_input": recipe.max_length,
            "tokens_of_a_batch": capacity.budget,
            "tokens_of_a_batch_source": capacity.source,
            "inputs_of_a_job": MAX_INPUTS,
            "tokens_of_a_job": MAX_TOKENS,
            "tokens_of_a_lone_input": longest_input(recipe.vocab_size),
        },
    }


def _sizes(sizes: tuple[int, ...] | None) -> str | list[int]:
    return "any" if sizes is None else list(sizes)


def _special_tokens(model: Model) -> str:
    """What stands around a text, such as `[CLS] … [SEP]`; "" for nothing."""
    bare = model.tokenizer.encode([_EXAMPLE], add_special_tokens=False)
    strings = model.tokenizer.token_strings(model.tokenizer.encode([_EXAMPLE]).ids.tolist())
    inside = model.tokenizer.token_strings(bare.ids.tolist())
    if strings == inside or not inside:
        return ""
    places = range(len(strings) - len(inside) + 1)
    at = next((place for place in places if strings[place : place + len(inside)] == inside), 0)
    return " ".join([*strings[:at], "…", *strings[at + len(inside) :]])
