"""A model's JSON files, as tests of their readers write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedstream.shared.models import ModelFiles
from embedstream.shared.recipe import Recipe
from embedstream.shared.recipe_files import read_recipe
from embedstream.shared.settings import Settings

OLD = "sentence_transformers.models"
BERT = {"model_type": "bert", "hidden_size": 32, "vocab_size": 100, "max_position_embeddings": 64}
WHOLE = "config_sentence_transformers.json"
OWN = "sentence_bert_config.json"
Make = Callable[..., ModelFiles]


def write_files(
    folder: Path,
    *,
    modules: Any = ("Transformer", "Pooling", "Normalize"),
    config: Any = BERT,
    pooling: Any = {"pooling_mode": "cls"},  # noqa: B006 (never changed)
    others: dict[str, Any] | None = None,
    transformer: str = "",
) -> ModelFiles:
    """Write them; None leaves a file out, a text is written as it is.

    The folder of a module is that of `sentence-transformers`: its place and its name.
    """
    if isinstance(modules, tuple):
        folders = [transformer, *(f"{place}_{name}" for place, name in enumerate(modules) if place)]
        modules = [
            {"path": path, "type": name if "." in name else f"{OLD}.{name}"}
            for path, name in zip(folders, modules, strict=False)
        ]
    contents = {f"{transformer}/config.json": config, "1_Pooling/config.json": pooling, "modules.json": modules}
    for name, value in {**contents, **(others or {})}.items():
        if value is not None:
            path = folder / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value))
    return ModelFiles(folder, "r")


def recipe_of(files: ModelFiles, **settings: Any) -> Recipe:
    """The recipe with some settings."""
    return read_recipe(files, Settings(**settings))
