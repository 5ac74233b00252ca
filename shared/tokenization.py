"""Texts to token ids: columns for the queue, never an object kept for each text.

API processes and producers tokenise with the `tokenizers` library alone, from the tokenizer of the model card.
Truncation is a slice of the finished ids, so the tokenizer itself is never changed and all threads share it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import InvalidInput, ModelLoadError
from .jobs import TruncationSide
from .recipe import Recipe

_LONE_CHARS = 2_000
GROUP_CHARS = 1_000_000
"""Of texts that go through the library together, unless one is longer: it takes some 200 bytes of memory for each
character, until its ids are taken over."""
_PROBE_ENTRIES = 1000  # vocabulary entries tried when no letter or digit gives a token


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of several inputs, one behind the other.

    Args:
        ids: (total,) uint32.
        lengths: (inputs,) uint32; they add up to `total`.
        cut: (inputs,) which inputs lost tokens; None for none.
    """

    ids: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    cut: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def truncated(self) -> int:
        """Number of inputs that lost tokens."""
        return 0 if self.cut is None else int(np.count_nonzero(self.cut))

    def without(self, inputs: Collection[int]) -> Tokens:
        """The same inputs, those at some places left without tokens."""
        if not inputs:
            return self
        keep = np.ones(len(self.lengths), np.bool_)
        keep[list(inputs)] = False
        lost = None if self.cut is None else self.cut & keep
        return Tokens(self.ids[np.repeat(keep, self.lengths)], np.where(keep, self.lengths, 0).astype(np.uint32), lost)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(inputs + 1,) where each input begins in `ids`; the last is `total`."""
        return offsets(self.lengths)


def offsets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """(n + 1,) running sum of (n,) lengths, from 0."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    return starts


def finished(tokenizer_json: str, *, do_lower_case: bool) -> str:
    """A tokenizer that does all by itself, as it stands on a model card: others need to know nothing more.

    Padding and truncation are off: all-MiniLM-L6-v2 pads to 128 and cuts at 128 there, against its own recipe. The JSON
    is changed as JSON, so that the card's fingerprint does not depend on the version of the library.

    Args:
        tokenizer_json: the model's own tokenizer.
        do_lower_case: of its recipe. As in sentence-transformers it becomes the first step of the normaliser, which
            leaves special tokens in a text alone.

    Raises:
        ModelLoadError: not a JSON object.
    """
    try:
        fields: dict[str, Any] = orjson.loads(tokenizer_json)
        fields |= {"padding": None, "truncation": None}
        if do_lower_case:
            own = fields.get("normalizer")
            fields["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *([own] if own else [])]}
        return orjson.dumps(fields).decode()
    except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"the tokenizer is no JSON object: {error}") from error


class TextTokenizer:
    """The tokenizer of one model card. Nothing changes it once it is made, so threads share it freely.

    Args:
        tokenizer_json: the tokenizer in the JSON form of the `tokenizers` library. Padding and truncation are switched
            off, should it not be `finished`.
        recipe: its truncation side is followed.

    Raises:
        ModelLoadError: the JSON is not a tokenizer.
    """

    def __init__(self, tokenizer_json: str, recipe: Recipe) -> None:
        try:
            tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library has no class of its own for this
            raise ModelLoadError(f"the tokenizer cannot be read: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._model_side = recipe.truncation_side
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """One more than the largest id the tokenizer can give."""
        self.max_token_chars = max(map(len, vocabulary), default=1)
        """Characters of the longest vocabulary entry: a text of k tokens is hardly ever longer than k times this."""
        self._prefix, self._suffix = self._count_special_tokens(islice(vocabulary, _PROBE_ENTRIES))

    @property
    def n_special(self) -> int:
        """Special tokens added to each text."""
        return self._prefix + self._suffix

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        add_special_tokens: bool = True,
        truncate_to: int | None = None,
        side: TruncationSide = TruncationSide.MODEL,
    ) -> Tokens:
        """Tokenise; inputs keep their order.

        Args:
            texts: any number of texts.
            prompt: put before each of them.
            add_special_tokens: whether the model's special tokens are put around each text.
            truncate_to: most tokens of an input, special tokens included; None cuts nothing.
            side: the end that loses tokens. MODEL takes the recipe's and keeps the special tokens, as transformers
                does; RIGHT and LEFT slice the finished sequence, special tokens and all.

        Raises:
            InvalidInput: a text holds a lone surrogate or cannot be tokenised, or `truncate_to` leaves no room beside
                the special tokens.
        """
        if truncate_to is not None:
            self._check_truncation(truncate_to, add_special_tokens, side)
        groups = [
            self._encode_group(group, first, prompt, add_special_tokens, truncate_to, side)
            for first, group in _groups(texts, len(prompt))
        ]
        return groups[0] if len(groups) == 1 else _joined(groups)

    def _encode_group(
        self,
        texts: Sequence[str],
        first: int,
        prompt: str,
        add_special_tokens: bool,
        truncate_to: int | None,
        side: TruncationSide,
    ) -> Tokens:
        try:
            whole = [prompt + text for text in texts] if prompt else texts
            # A lone query skips the library's thread pool. A long text must not: `encode` keeps the interpreter lock,
            # and with a megabyte it would stop every other request for 2 s.
            if len(whole) == 1 and len(whole[0]) <= _LONE_CHARS:
                rows = [self._tokenizer.encode(whole[0], add_special_tokens=add_special_tokens).ids]
            else:
                encodings = self._tokenizer.encode_batch_fast(list(whole), add_special_tokens=add_special_tokens)
                rows = [encoding.ids for encoding in encodings]
        except Exception as error:  # the library's own errors are bare ones
            for _, reason in self.unreadable(texts, first, prompt):
                raise reason from error
            raise InvalidInput(f"The input cannot be tokenised: {error}.", param="input") from error
        lost = None
        lengths = np.fromiter(map(len, rows), np.uint32, len(rows))
        if truncate_to is not None and (lengths > truncate_to).any():
            lost = lengths > truncate_to
            for index in np.flatnonzero(lost).tolist():
                rows[index] = self._cut_row(rows[index], truncate_to, add_special_tokens, side)
            lengths[lost] = truncate_to
        ids = np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum(dtype=np.int64)))
        return Tokens(ids, lengths, lost)

    def prompt_length(self, prompt: str, *, add_special_tokens: bool, most: int) -> int:
        """How many leading tokens of a text are those of the prompt before it.

        As sentence-transformers counts them: the tokens of the prompt alone, without a special token at its end.

        Args:
            prompt: its text.
            add_special_tokens: as the text was tokenised.
            most: tokens of the longest input; a longer prompt is cut as an input is.
        """
        ids = self.encode([prompt], add_special_tokens=add_special_tokens, truncate_to=most).ids.tolist()
        special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        ends = bool(ids) and (ids[-1] in special or (add_special_tokens and self._suffix > 0))
        return len(ids) - ends

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, as the tokenizer's decoder joins them.

        Raises:
            InvalidInput: an id that the tokenizer never gives; naming the first.
        """
        self._check_known(ids)
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry of each id, as it stands there (`##ing`); "" for an id without one.

        Raises:
            InvalidInput: as for `decode`.
        """
        self._check_known(ids)
        return [self._tokenizer.id_to_token(token) or "" for token in ids]

    def _check_known(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidInput(
                    f"Token id {token} is out of vocabulary: this tokenizer's ids are 0 to {self.vocab_size - 1}.",
                    param="tokens",
                )

    def _check_truncation(self, limit: int, add_special_tokens: bool, side: TruncationSide) -> None:
        check_room(limit, self.n_special if add_special_tokens and side is TruncationSide.MODEL else 0)

    def _cut_row(self, row: list[int], limit: int, add_special_tokens: bool, side: TruncationSide) -> list[int]:
        prefix, suffix = self._prefix, self._suffix
        if side is not TruncationSide.MODEL or not add_special_tokens:
            prefix = suffix = 0
        if _loses_left(side, self._model_side):
            return row[:prefix] + row[len(row) - limit + prefix :]
        return row[: limit - suffix] + row[len(row) - suffix :]

    def _count_special_tokens(self, vocabulary: Iterable[str]) -> tuple[int, int]:
        """How many special tokens stand before and after a text."""
        for probe in chain(("a", "0"), vocabulary):
            try:
                mask = self._tokenizer.encode(probe).special_tokens_mask
            except Exception:  # noqa: BLE001, S112 (a tokenizer may refuse what its vocabulary lacks)
                continue
            if 0 in mask:
                return mask.index(0), mask[::-1].index(0)
        return self._tokenizer.num_special_tokens_to_add(False), 0  # no text has a token of its own

    def unreadable(self, texts: Sequence[str], first: int = 0, prompt: str = "") -> Iterator[tuple[int, InvalidInput]]:
        """Which texts the library refuses, and why: first those that are no text, then each of the others is tried.

        Args:
            texts: of a request, or a slice of them.
            first: place of the first one in the request.
            prompt: put before each of them.
        """
        malformed = set()
        for index, reason in malformed_texts(texts, first):
            malformed.add(index)
            yield index, reason
        for index, text in enumerate(texts, first):
            if index in malformed:
                continue
            try:
                self._tokenizer.encode_batch_fast([prompt + text])  # `encode` would keep the interpreter lock
            except Exception as reason:  # noqa: BLE001 (bare, as above)
                yield index, InvalidInput(f"The input at index {index} cannot be tokenised: {reason}.", param="input")


def malformed_texts(texts: Sequence[str], first: int = 0) -> Iterator[tuple[int, InvalidInput]]:
    """Which inputs are no texts that have a form in UTF-8, and why.

    Args:
        texts: of a request, or a slice of them.
        first: place of the first one in the request.
    """
    for index, text in enumerate(texts, first):
        if not isinstance(text, str):
            yield index, InvalidInput(f"The input at index {index} is not a text.", param="input")
            continue
        try:
            text.encode()
        except UnicodeEncodeError as surrogate:
            yield index, lone_surrogate(index, surrogate)


def _groups(texts: Sequence[str], prompt_chars: int) -> Iterator[tuple[int, Sequence[str]]]:
    """Texts that go through the library together, each with the place of the first; at least one group."""
    first = n_chars = 0
    for index, text in enumerate(texts):
        size = prompt_chars + (len(text) if isinstance(text, str) else 0)  # what is no text is refused with its group
        if index > first and n_chars + size > GROUP_CHARS:
            yield first, texts[first:index]
            first, n_chars = index, 0
        n_chars += size
    yield first, texts[first:] if first else texts


def _joined(groups: Sequence[Tokens]) -> Tokens:
    lost = None
    if any(group.cut is not None for group in groups):
        lost = np.concatenate([np.zeros(len(group), np.bool_) if group.cut is None else group.cut for group in groups])
    return Tokens(
        np.concatenate([group.ids for group in groups]), np.concatenate([group.lengths for group in groups]), lost
    )


def cut(
    ids: NDArray[np.integer],
    lengths: NDArray[np.integer],
    limit: int,
    side: TruncationSide = TruncationSide.MODEL,
    model_side: TruncationSide = TruncationSide.RIGHT,
) -> Tokens:
    """Truncate inputs that came as token ids; they are plain sequences, without special tokens to keep.

    Args:
        ids: (total,) any integer type, below 2^32.
        lengths: (inputs,) adding up to `total`.
        limit: most tokens of an input, at least 1.
        side: the end that loses tokens; MODEL takes `model_side`.
        model_side: RIGHT or LEFT, from the recipe.
    """
    kept = np.minimum(lengths, limit).astype(np.uint32)
    lost = lengths > limit
    if not lost.any():
        return Tokens(ids.astype(np.uint32, copy=False), kept)
    bounds, targets = offsets(lengths), offsets(kept)
    starts = bounds[1:] - kept if _loses_left(side, model_side) else bounds[:-1]
    sources = np.arange(targets[-1]) + np.repeat(starts - targets[:-1], kept)
    return Tokens(ids[sources].astype(np.uint32), kept, lost)


def lone_surrogate(index: int, error: UnicodeEncodeError) -> InvalidInput:
    """What to tell of a text that has no UTF-8."""
    return InvalidInput(
        f"The input at index {index} is not valid Unicode: a lone surrogate "
        f"U+{ord(error.object[error.start]):04X} at character {error.start}.",
        param="input",
    )


def check_room(limit: int, n_special: int) -> None:
    """Refuse to cut inputs so short that nothing of them is left.

    Args:
        limit: most tokens of an input.
        n_special: special tokens that stay.

    Raises:
        InvalidInput: naming the least there may be.
    """
    if limit < n_special + 1:
        beside = f" beside its {n_special} special tokens" if n_special else ""
        raise InvalidInput(
            f"truncate_prompt_tokens must be -1 or at least {n_special + 1}, so that a token of the input is left"
            f"{beside} (got {limit}).",
            param="truncate_prompt_tokens",
        )


def _loses_left(side: TruncationSide, model_side: TruncationSide) -> bool:
    return (model_side if side is TruncationSide.MODEL else side) is TruncationSide.LEFT
