"""How large a request may be, all its inputs together."""

from __future__ import annotations

from embedstream.producer import LongInputs, Options
from embedstream.producer.fleet import ServedModel
from embedstream.producer.request import Inputs
from embedstream.shared.errors import InvalidInput

_LONG_CHARS = 200_000
"""Texts above this size are tokenised two requests at a time; the others need no watching (50 us) of their client."""


def check(what: str, count: int, limit: int) -> None:
    """Refuse a request that has too much of something.

    Raises:
        InvalidInput: it has more than `limit`.
    """
    if count > limit:
        raise InvalidInput(
            f"A request may have at most {limit} {what} (--max-request-{what}), this one has {count}: "
            "send it in several.",
            param="input",
        )


def refuse_absurd(inputs: Inputs, options: Options, served: ServedModel | None, limit: int) -> None:
    """Refuse what has too many tokens without counting them all: ids are only numbered, texts only measured.

    Args:
        inputs: texts or token ids.
        options: whether they are cut.
        served: the model; None while nobody has announced it.
        limit: most tokens of a request.

    Raises:
        InvalidInput: it has more, or its texts are longer than so many tokens.
    """
    if served is None:
        return
    cut_to = options.truncate_prompt_tokens
    if cut_to is None and options.long_inputs is LongInputs.TRUNCATE:
        cut_to = -1
    most = served.card.recipe.max_length if cut_to == -1 else cut_to
    if not isinstance(inputs[0] if len(inputs) else "", str):
        check("tokens", sum(len(row) if most is None else min(len(row), most) for row in inputs), limit)
    else:  # also those that are cut: they are tokenised whole before
        n_chars, most_chars = _chars(inputs, options, served), limit * served.tokenizer.max_token_chars
        if n_chars > most_chars:
            raise InvalidInput(
                f"A request may have at most {limit} tokens (--max-request-tokens), and this model's longest one has "
                f"{served.tokenizer.max_token_chars} characters; the texts and their prompts have {n_chars}: send them "
                "in several requests.",
                param="input",
            )


def takes_long(inputs: Inputs, options: Options, served: ServedModel | None) -> bool:
    """Whether a request may wait for its turn to be tokenised: who has left meanwhile must not keep a place."""
    return len(inputs) > 0 and isinstance(inputs[0], str) and _chars(inputs, options, served) > _LONG_CHARS


def _chars(texts: Inputs, options: Options, served: ServedModel | None) -> int:
    """Characters of texts, with the prompt before each of them."""
    recipe = None if served is None else served.card.recipe
    prompt = "" if recipe is None else recipe.prompt_text(recipe.prompt_of(options.prompt))
    return sum(map(len, texts)) + len(prompt) * len(texts)
