"""What made the vectors, in words that stay with them: the metadata of every output."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version

import orjson

from embedstream.producer.request import Options
from embedstream.shared.cards import Announcement, ModelCard


def metadata_of(card: ModelCard, options: Options, consumers: Iterable[Announcement]) -> dict[str, str]:
    """The metadata of an output; `embedstream.recipe` is JSON, all other values are plain texts.

    Args:
        card: of the model.
        options: how texts are embedded.
        consumers: those that serve the model now.

    Raises:
        InvalidInput: the model has no such prompt or adapter.
    """
    recipe, vectors = card.recipe, options.vectors
    prompt = recipe.prompt_of(options.prompt)
    normalized = recipe.normalize if vectors.normalize is None else vectors.normalize
    said = {
        "max_length": recipe.max_length,
        "pooling": recipe.pooling_name,
        "head": recipe.head,
        "normalize": normalized,
        "dimensions": vectors.dimensions or recipe.size(per_token=False),
        "similarity": recipe.similarity,
    }
    about = {
        "version": version("embedstream"),
        "model": card.model,
        "revision": card.revision,
        "fingerprint": card.fingerprint.hex(),
        "recipe": orjson.dumps(said).decode(),
        "compute_dtype": ",".join(sorted({consumer.dtype for consumer in consumers})),
        "dtype": vectors.dtype.value,
        "prompt_name": prompt,
        "prompt": recipe.prompt_text(prompt),
        "task": recipe.adapter_of(options.adapter, options.prompt),
    }
    return {f"embedstream.{name}": value for name, value in about.items()}
