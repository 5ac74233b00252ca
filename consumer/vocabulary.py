"""Whether a tokenizer and a model belong together: ids beyond the embeddings fail, others are only wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.jobs import longest_input
from embedstream.shared.logs import get_logger
from embedstream.shared.recipe import Recipe
from embedstream.shared.tokenization import TextTokenizer

log = get_logger()

_ENDS = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")
_KNOWN_SHARE = 0.9
"""Of the embeddings: those that were added to round their number up are fewer than the rest."""


def with_embeddings(recipe: Recipe, module: Any) -> Recipe:
    """The recipe with the rows there really are in the embedding matrix: a higher id would end in an index error.

    Its limit is at most what a job can carry.

    Raises:
        ModelLoadError: it has no such matrix.
    """
    try:
        rows = int(module.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError) as error:  # such as CANINE, which hashes letters
        raise ModelLoadError(f"{type(module).__name__} has no table of embeddings, one for each token id") from error
    most = longest_input(rows)
    if recipe.max_length > most:
        log.warning("model.limit_lowered", max_length=recipe.max_length, to=most, reason="the largest job")
    return replace(recipe, vocab_size=rows, max_length=min(recipe.max_length, most))


def check_tokenizer(tokenizer: TextTokenizer, recipe: Recipe, config: Any) -> None:
    """Refuse a tokenizer that cannot be the model's; warn of one that looks as if it were not.

    Args:
        tokenizer: as on the card.
        recipe: with the rows of the embedding matrix.
        config: of transformers.

    Raises:
        ModelLoadError: it gives ids that the model has no embeddings for, or a text has no room beside special tokens.
    """
    if tokenizer.vocab_size > recipe.vocab_size:
        raise ModelLoadError(
            f"the tokenizer gives ids up to {tokenizer.vocab_size - 1}, the model has embeddings for 0 to "
            f"{recipe.vocab_size - 1}: it is not this model's tokenizer"
        )
    if recipe.max_length <= tokenizer.n_special:
        raise ModelLoadError(
            f"--max-model-len {recipe.max_length} leaves no room beside the {tokenizer.n_special} special tokens"
        )
    for doubt in doubts_about(tokenizer, recipe, config):
        log.warning("model.tokenizer_doubtful", reason=doubt)


def doubts_about(tokenizer: TextTokenizer, recipe: Recipe, config: Any) -> Iterator[str]:
    """Why the tokenizer may be another model's, in words.

    Arguments are those of `check_tokenizer`.
    """
    if tokenizer.vocab_size < _KNOWN_SHARE * recipe.vocab_size:
        yield f"it knows {tokenizer.vocab_size} ids, the model {recipe.vocab_size}: it may be another model's"
    around, named = set(tokenizer.encode([""]).ids.tolist()), _named_ends(config)
    if named and not around <= named:
        yield (
            f"it puts the ids {_listed(around)} around a text, config.json names {_listed(named)}: it may be another "
            "model's"
        )


def _named_ends(config: Any) -> set[int]:
    """The ids that stand around a text by the configuration, which may name several for an end, or none."""
    values = [getattr(getattr(config, "text_config", config), name, None) for name in _ENDS]
    return {each for value in values for each in (value if isinstance(value, list) else [value]) if each is not None}


def _listed(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids)))
