"""Token ids of OpenAI's `cl100k_base` in place of the model's own, for `--token-ids cl100k`.

LangChain's OpenAIEmbeddings sends such ids by default, whatever the model. They are turned back into the texts they
were made of, and go on as texts do: the model's tokenizer, its special tokens, its counts, the same vectors.

The vocabulary is OpenAI's file, known by its SHA-256. It is looked for on this machine and never downloaded.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InvalidInput, Misconfigured
from embedstream.shared.settings import Settings, TokenIds

from .inputs import Inputs

if TYPE_CHECKING:
    import tiktoken

_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_CACHED_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # SHA-1 of its address, as tiktoken names what it keeps
_CACHE_VARIABLES = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
_PACKAGES = (  # they bring the file, for the same reason: no download at run time
    ("litellm", "litellm_core_utils/tokenizers"),
    ("llama_index", "core/_static/tiktoken_cache"),
)

# From tiktoken_ext/openai_public.py, which cannot be asked without a download.
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}

_ON_LOOP_IDS = 20_000
"""Up to so many are decoded on the event loop (about 1 ms); a thread costs 0.1 ms."""


_NO_TIKTOKEN = "--token-ids cl100k needs the package tiktoken: pip install '.[cl100k]' in embedstream's folder"


class ForeignIds:
    """Reads inputs that are ids of `cl100k_base`.

    Args:
        vocabulary: OpenAI's file `cl100k_base.tiktoken`.
        max_ids: most ids in one request. The texts' tokens are counted as always, but may be far fewer.

    Raises:
        Misconfigured: the package `tiktoken` is not installed.
    """

    def __init__(self, vocabulary: bytes, max_ids: int) -> None:
        self._encoding = _encoding_of(vocabulary)
        self._max_ids = max_ids

    async def texts_of(self, inputs: Inputs) -> list[str]:
        """The texts that the ids stand for; inputs that are texts stay as they are.

        A piece of a text may begin or end amid the bytes of a character: what is left of it becomes U+FFFD. No ids at
        all are the empty text.

        Args:
            inputs: of one request.

        Raises:
            InvalidInput: too many ids, or one that `cl100k_base` does not have.
        """
        texts = [row for row in inputs if isinstance(row, str)]
        if len(texts) == len(inputs):
            return texts
        rows = [row for row in inputs if not isinstance(row, str)]
        n_ids = sum(map(len, rows))
        if n_ids > self._max_ids:
            raise InvalidInput(
                f"A request may have at most {self._max_ids} tokens (--max-request-tokens), this one has {n_ids} "
                "token ids: send it in several.",
                param="input",
            )
        if n_ids <= _ON_LOOP_IDS:
            return self._decode(rows)
        return await asyncio.to_thread(self._decode, rows)

    def _decode(self, rows: Sequence[list[int] | NDArray[np.integer]]) -> list[str]:
        texts = []
        for index, ids in enumerate(rows):
            row = ids if isinstance(ids, list) else ids.tolist()
            try:
                texts.append(self._encoding.decode(row, errors="replace"))
            except (KeyError, OverflowError):
                bad = next(number for number in row if not self._has(number))
                raise InvalidInput(
                    f"Token id {bad} is out of vocabulary: this server reads token ids as those of cl100k_base "
                    f"(--token-ids cl100k), which are 0 to {max(_SPECIAL.values())} with gaps (input at index "
                    f"{index}). Send texts, or ids of cl100k_base.",
                    param="input",
                ) from None
        return texts

    def _has(self, number: int) -> bool:
        try:
            self._encoding.decode_single_token_bytes(number)
        except (KeyError, OverflowError):
            return False
        return True


def reader_of(settings: Settings) -> ForeignIds | None:
    """What reads the token ids of requests; None when they are the model's own.

    Raises:
        Misconfigured: the settings ask for `cl100k`, and its vocabulary or the package `tiktoken` is not there.
    """
    if settings.token_ids is not TokenIds.CL100K:
        return None
    return ForeignIds(_vocabulary(settings.cl100k_vocabulary), settings.max_request_tokens)


def check(settings: Settings) -> None:
    """Look whether `reader_of` has what it needs, without the seconds and the memory that it takes.

    Raises:
        Misconfigured: as `reader_of` says.
    """
    if settings.token_ids is TokenIds.CL100K:
        _vocabulary(settings.cl100k_vocabulary)
        if find_spec("tiktoken") is None:
            raise Misconfigured(_NO_TIKTOKEN)


def _encoding_of(vocabulary: bytes) -> tiktoken.Encoding:
    try:
        import tiktoken
    except ImportError:
        raise Misconfigured(_NO_TIKTOKEN) from None
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, vocabulary.splitlines())}
    return tiktoken.Encoding("cl100k_base", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=_SPECIAL)


def _vocabulary(path: Path | None) -> bytes:
    if path is not None:
        return _read(path)
    places = list(_places())
    for place in places:
        if place.is_file():
            return _read(place)
    looked = ", ".join(str(place.parent) for place in places)
    raise Misconfigured(
        "--token-ids cl100k needs OpenAI's vocabulary, which is not downloaded at run time: name the file "
        "cl100k_base.tiktoken with --cl100k-vocabulary, or set TIKTOKEN_CACHE_DIR to where tiktoken keeps it, or "
        f"install litellm or llama-index-core, which bring it (no {_CACHED_NAME} in: {looked})"
    )


def _places() -> Iterator[Path]:
    """Where the file may be: the caches of tiktoken, in its own order, then packages that bring it."""
    named = [folder for variable in _CACHE_VARIABLES if (folder := os.environ.get(variable))]
    for folder in named or [f"{tempfile.gettempdir()}/data-gym-cache"]:
        yield Path(folder) / _CACHED_NAME
    for package, folder in _PACKAGES:
        spec = find_spec(package)  # of a top-level package: finds it without importing it
        for root in (spec and spec.submodule_search_locations) or ():
            yield Path(root) / folder / _CACHED_NAME


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Misconfigured(f"the vocabulary of cl100k_base cannot be read: {path}: {error.strerror}") from None
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise Misconfigured(f"{path} is not OpenAI's cl100k_base.tiktoken: its SHA-256 is {found} instead of {_SHA256}")
    return content
