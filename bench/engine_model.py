"""What the sides of `make bench-engine` know of a model, read as the engine reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embedstream.consumer.tokenizer_files import read_tokenizer
from embedstream.shared.json_files import read_object
from embedstream.shared.models import locate
from embedstream.shared.recipe import Recipe
from embedstream.shared.recipe_files import read_recipe, transformer_folder
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer, finished


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model's files.

    Args:
        path: of the whole model, as sentence-transformers loads it.
        transformer: the folder of its transformer.
        revision: what names this state of the files.
        recipe: how hidden states become vectors.
        tokenizer: whose ids all sides read.
        pad_id: what fills a batch up.
    """

    path: Path
    transformer: Path
    revision: str
    recipe: Recipe
    tokenizer: TextTokenizer
    pad_id: int


def read(model: str) -> KnownModel:
    """A model by its name or folder, as `--model` takes it.

    Raises:
        ModelLoadError: it is not there, or not understood.
    """
    settings = Settings(model=model)
    files = locate(settings.model, settings.revision)
    recipe = read_recipe(files, settings)
    folder = transformer_folder(files.path)
    own = read_tokenizer(folder)
    tokenizer = TextTokenizer(finished(own.json, do_lower_case=recipe.do_lower_case), recipe)
    pad_id = read_object(folder / "config.json").get("pad_token_id")
    return KnownModel(files.path, folder, files.revision, recipe, tokenizer, pad_id if isinstance(pad_id, int) else 0)
