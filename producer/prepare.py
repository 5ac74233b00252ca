"""Check and tokenise a request. Everything that can be refused is refused here, before anything is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InputTooLong, InvalidInput, NotServed, Unavailable
from embedstream.shared.input_checks import long_texts, resolve_truncation, too_long, unknown_ids, without_tokens
from embedstream.shared.jobs import MAX_BODY_BYTES, MAX_STRING_BYTES, LongInputs, TruncationSide, text_lengths
from embedstream.shared.left_out import check_side, is_left_out, not_in_pieces
from embedstream.shared.recipe import ROLE, Recipe
from embedstream.shared.tokenization import (
    TextTokenizer,
    Tokens,
    cut,
    lone_surrogate,
    malformed_texts,
)

from .failures import Refusals
from .fleet import ServedModel
from .forks import watch
from .request import Inputs, Options, Prepared
from .token_ids import columns, sequences

ON_LOOP_CHARS = 2_000
INPUT_CHARS = 20
"""Requests up to this size are prepared on the event loop (about 1 ms), where an input counts as so many characters
more; a thread costs 0.1 ms."""
ON_LOOP_IDS = 20_000
ROW_IDS = 64
"""The same for token ids, where an input counts as so many ids more."""
AT_ONCE_CHARS = 200_000
"""Texts of more characters together wait for one another, for tokenising takes some 200 bytes of memory for each."""

MAX_TEXT_BYTES = MAX_BODY_BYTES - 4
"""Of a text that a consumer is to tokenise: it must fit one job."""
MAX_WHOLE_CHARS = 4 * 1024 * 1024
"""Of a text that is cut or embedded in pieces, for it is tokenised whole: about a million tokens, and seconds."""


class _LargeTexts:
    """Two threads, of which a forked process gets its own."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(2, "large-texts")

    def forked(self) -> object:
        """Leave the threads to the process that has them."""
        inherited, self.pool = self.pool, ThreadPoolExecutor(2, "large-texts")
        return inherited


_large_texts = _LargeTexts()
watch(_large_texts)
_MAX_OPTION = 2**31  # what a job has room for, and more than any model offers


async def prepare(inputs: Inputs, options: Options, served: ServedModel) -> Prepared:
    """Check a request and turn it into columns.

    Args:
        inputs: texts, or sequences of token ids; not a mixture.
        options: how to treat them.
        served: the model.

    Raises:
        InvalidInput: something in it cannot be served; nothing has been queued. With `partial` options only what is
            about the request as a whole; the inputs that cannot be served are the result's failures.
        NotServed: the model does not make the kind of vectors asked for.
    """
    recipe = served.card.recipe
    if recipe.per_token and not options.vectors.per_token:
        raise NotServed(
            f"The model `{served.card.model}` is served with pooling `all`: one vector for each token. "
            "Use embed_tokens() of the producer library."
        )
    refusals = Refusals(options.partial)
    texts = inputs if _are_texts(inputs) else None
    prompt = _prompt_of(recipe, options, puts_one=texts is not None and options.chat is None)
    adapter = recipe.adapter_of(options.adapter, options.prompt)
    _check_names(prompt, adapter, options)
    if texts is not None:
        tokens = await _tokenize(texts, recipe.prompt_text(prompt), options, served, refusals)
        recipe.check_dimensions(options.vectors.dimensions, served.card.model, per_token=options.vectors.per_token)
        refusals.take(without_tokens(tokens.lengths))
    else:
        rows = sequences(inputs)
        if sum(map(len, rows)) + ROW_IDS * len(rows) <= ON_LOOP_IDS:
            tokens = _take_ids(rows, options, served, refusals)
        else:
            tokens = await asyncio.to_thread(_take_ids, rows, options, served, refusals)
    return Prepared(
        served.card,
        inputs,
        tokens.without(refusals.failures),
        options,
        failures=refusals.failures,
        piece_tokens=recipe.max_length if _is_chunked(options) else 0,
        prompt=prompt,
        adapter=adapter,
    )


async def prepare_texts(inputs: Inputs, options: Options, model: str) -> Prepared:
    """Check what can be checked while nobody has told what the model is like; its consumer does the rest.

    Args:
        inputs: texts.
        options: how to treat them.
        model: first served name.

    Raises:
        InvalidInput: something in it can be served by no model; nothing has been queued. With `partial` options as
            `prepare` says.
        Unavailable: token ids, which only the model's card can tell to be right.
    """
    if not _are_texts(inputs):
        raise Unavailable(
            f"Token ids cannot be checked before the first consumer of `{model}` has told what they mean; send texts.",
            retry_after_s=2.0,
        )
    _check_option(options.truncate_prompt_tokens, "truncate_prompt_tokens", other=-1)
    _check_option(options.vectors.dimensions, "dimensions")
    _check_names(options.prompt, options.adapter, options)
    refusals = Refusals(options.partial)
    lengths = await asyncio.to_thread(_text_bytes, inputs, refusals)
    tokens = Tokens(np.empty(0, np.uint32), lengths)
    return Prepared(
        None,
        inputs,
        tokens,
        options,
        model,
        failures=refusals.failures,
        prompt=options.prompt,
        adapter=options.adapter,
    )


def _prompt_of(recipe: Recipe, options: Options, *, puts_one: bool) -> str:
    """The name of the prompt that is put before the inputs, or "" for none.

    Args:
        recipe: the model's.
        options: what was asked for.
        puts_one: whether these inputs can get one; others do without the model's default.

    Raises:
        InvalidInput: there is no such prompt, or it was asked for by name or role and the inputs cannot get one.
    """
    name = recipe.prompt_of(options.prompt)
    if puts_one:
        return name
    if options.prompt and recipe.prompt_text(name):
        what = "token ids" if options.chat is None else "chat messages"
        raise InvalidInput(
            f"The prompt `{name}` cannot be put before {what}: send texts, or leave it out.",
            param=_prompt_param(options),
        )
    return ""


def _prompt_param(options: Options) -> str:
    return "input_type" if options.prompt.startswith(ROLE) else "prompt_name"


def _is_chunked(options: Options) -> bool:
    return options.truncate_prompt_tokens is None and options.long_inputs is LongInputs.CHUNK


def _limit(options: Options, recipe: Recipe, n_special: int) -> int | None:
    """Most tokens of an input, what is above being cut; None cuts nothing."""
    asked = options.truncate_prompt_tokens
    if asked is None and options.long_inputs is LongInputs.TRUNCATE:
        asked = -1
    return resolve_truncation(asked, recipe, n_special)


def _text_bytes(texts: Sequence[str], refusals: Refusals) -> NDArray[np.uint32]:
    try:
        lengths = text_lengths(tuple(texts))
    except UnicodeEncodeError:
        lengths = np.zeros(len(texts), np.uint32)
        for index, text in enumerate(texts):
            try:
                lengths[index] = len(text.encode())
            except UnicodeEncodeError as error:
                refusals.refuse(index, lone_surrogate(index, error))
    for index in np.flatnonzero(lengths > MAX_TEXT_BYTES).tolist():
        reason = InputTooLong(
            f"The input at index {index} has {int(lengths[index])} bytes of text; at most {MAX_TEXT_BYTES} are taken "
            "while no consumer of the model is up.",
            param="input",
        )
        refusals.refuse(index, reason)
        lengths[index] = 0
    return lengths


def _check_option(value: int | None, param: str, other: int | None = None) -> None:
    if value is not None and value != other and not 1 <= value < _MAX_OPTION:
        also = "" if other is None else f"{other} or "
        raise InvalidInput(f"{param} must be {also}at least 1 and less than {_MAX_OPTION} (got {value}).", param=param)


def _check_names(prompt: str, adapter: str, options: Options) -> None:
    """Refuse names that no job has room for."""
    for name, param in ((prompt, _prompt_param(options)), (adapter, "task")):
        try:
            n_bytes = len(name.encode())
        except UnicodeEncodeError:
            raise InvalidInput(f"{param} is not valid Unicode.", param=param) from None
        if n_bytes > MAX_STRING_BYTES:
            raise InvalidInput(f"{param} has {n_bytes} bytes; a name has at most {MAX_STRING_BYTES}.", param=param)


async def _tokenize(
    texts: Sequence[str], prompt: str, options: Options, served: ServedModel, refusals: Refusals
) -> Tokens:
    recipe, tokenizer = served.card.recipe, served.tokenizer
    keeps_specials = options.add_special_tokens and options.truncation_side is TruncationSide.MODEL
    limit = _limit(options, recipe, tokenizer.n_special if keeps_specials else 0)
    left_out = is_left_out(recipe, prompt, per_token=options.vectors.per_token)
    if left_out and limit is not None:
        check_side(options.truncation_side)
    if limit is None and not _is_chunked(options):
        refusals.take(long_texts(texts, recipe.max_length, tokenizer.max_token_chars, len(prompt)))
    else:
        for index, text in enumerate(texts):
            if len(prompt) + len(text) > MAX_WHOLE_CHARS:
                refusals.refuse(index, _too_long_at_all(index, len(prompt) + len(text)))
    n_chars = len(prompt) * len(texts)
    n_chars += sum(len(text) for index, text in enumerate(texts) if index not in refusals.failures)
    work = (tokenizer, texts, prompt, options, limit, refusals)
    if n_chars + INPUT_CHARS * len(texts) <= ON_LOOP_CHARS:
        tokens = _encode(*work)
    elif n_chars <= AT_ONCE_CHARS:
        tokens = await asyncio.to_thread(_encode, *work)
    else:
        tokens = await asyncio.get_running_loop().run_in_executor(_large_texts.pool, _encode, *work)
    if limit is None and not _is_chunked(options):
        refusals.take(too_long(tokens.lengths, recipe.max_length))
    elif left_out:
        refusals.take(not_in_pieces(tokens.lengths, recipe.max_length))
    return tokens


def _encode(
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    prompt: str,
    options: Options,
    limit: int | None,
    refusals: Refusals,
) -> Tokens:
    """Tokenise what is not refused; the others stand as empty texts, so that each keeps its place."""

    def kept() -> Sequence[str]:
        refused = refusals.failures
        return ["" if index in refused else text for index, text in enumerate(texts)] if refused else texts

    def encode() -> Tokens:
        return tokenizer.encode(
            kept(),
            prompt=prompt,
            add_special_tokens=options.add_special_tokens,
            truncate_to=limit,
            side=options.truncation_side,
        )

    # To try each text by itself is the last resort.
    for refuses in (malformed_texts, partial(tokenizer.unreadable, prompt=prompt)):
        try:
            return encode()
        except InvalidInput:
            if not options.partial:
                raise
            refusals.take(refuses(kept()))
    return encode()


def _too_long_at_all(index: int, chars: int) -> InputTooLong:
    return InputTooLong(
        f"The input at index {index} has {chars} characters; of a text that is cut or embedded in pieces at most "
        f"{MAX_WHOLE_CHARS} are taken.",
        param="input",
    )


def _are_texts(inputs: Inputs) -> TypeGuard[Sequence[str]]:
    if len(inputs) == 0:
        raise InvalidInput("You must pass at least one prompt: the list of inputs is empty.", param="input")
    texts = sum(isinstance(item, str) for item in inputs)
    if 0 < texts < len(inputs):
        raise InvalidInput("Texts and token ids cannot be mixed in one request.", param="input")
    return texts > 0


def _take_ids(rows: Sequence[Sequence[int]], options: Options, served: ServedModel, refusals: Refusals) -> Tokens:
    recipe = served.card.recipe
    ids, lengths = columns(rows, refusals)
    limit = _limit(options, recipe, n_special=0)
    if limit is None and not _is_chunked(options):
        refusals.take(too_long(lengths, recipe.max_length))
    recipe.check_dimensions(options.vectors.dimensions, served.card.model, per_token=options.vectors.per_token)
    refusals.take(without_tokens(lengths))
    refusals.take(unknown_ids(ids, lengths, recipe.vocab_size))
    longest = int(lengths.max(initial=1))
    return cut(ids, lengths, limit or longest, options.truncation_side, recipe.truncation_side)
