"""Model cards: what a caller must know of a model to tokenise for it, published by consumers through Redis.

A card is the recipe and the tokenizer of one revision, named by its fingerprint. Consumers announce the fingerprint
with each heartbeat; API processes and producers fetch the card once and keep it on disk: they hold no model files.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from .cache_folder import cache_folder
from .errors import MalformedMessage
from .jobs import TruncationSide
from .recipe import Pooling, Recipe

PIECE_BYTES = 1024 * 1024
_VERSION = 1  # raised only when an older reader would make other tokens or vectors of a card
_MAX_CARD_BYTES = 256 * 1024 * 1024  # a tokenizer of a million entries is about 40 MB of JSON
_MOST_PIECES = _MAX_CARD_BYTES // PIECE_BYTES
_MOST = 1e12  # of any number that a consumer says of itself

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How chat messages become text, for models whose tokenizer has a chat template.

    Args:
        templates: Jinja templates by name; `default` is used where none is named.
        special_tokens: what the templates may put around messages, such as `bos_token`, by name.
    """

    templates: dict[str, str]
    special_tokens: dict[str, str]

    def __post_init__(self) -> None:
        for table in (self.templates, self.special_tokens):
            if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
                raise TypeError("a chat format holds two tables of texts")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One revision of one model.

    Args:
        model: first served name; it names the queue.
        recipe: how vectors are made, overrides of the operator included.
        tokenizer: the tokenizer as JSON of the `tokenizers` library, finished: see `tokenization.finished`.
        revision: commit or content hash of the weights.
        fingerprint: 16 bytes that change whenever the same text could get other tokens or another vector. Computed
            when it is not given; every job carries it.
        chat: None without a chat template. It is a part of what is hashed only where there is one, so the fingerprints
            of other models are those that versions without this field give.
    """

    model: str
    recipe: Recipe
    tokenizer: str
    revision: str
    fingerprint: bytes = b""
    chat: ChatFormat | None = None

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint_of(self._payload()))

    def _payload(self) -> bytes:
        """What is published and hashed: neither the name nor what only people read changes a vector."""
        recipe = asdict(self.recipe) | {"pooling": self.recipe.pooling_name}
        del recipe["pooling_source"]
        fields = {"version": _VERSION, "recipe": recipe, "tokenizer": self.tokenizer, "revision": self.revision}
        if self.chat is not None:
            fields["chat"] = asdict(self.chat)
        return orjson.dumps(fields)

    def encode(self) -> list[bytes]:
        """The card in compressed pieces of at most 1 MiB."""
        data = zlib.compress(self._payload(), 6)
        return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]

    @classmethod
    def decode(cls, pieces: list[bytes], fingerprint: bytes, model: str) -> ModelCard:
        """Put the pieces together again and check that they are the card asked for.

        The bytes as published are hashed, and fields this version does not know are left out: a card may come from a
        consumer that is older or newer than this process.

        Raises:
            MalformedMessage: damaged, another card, or one that needs a newer version.
        """
        try:
            payload = zlib.decompressobj().decompress(b"".join(pieces), _MAX_CARD_BYTES)
            if _fingerprint_of(payload) != fingerprint:
                raise MalformedMessage(f"the model card {fingerprint.hex()} holds {_fingerprint_of(payload).hex()}")
            fields = orjson.loads(payload)
            if fields["version"] > _VERSION:
                raise MalformedMessage(f"the model card has version {fields['version']}; this side reads {_VERSION}")
            recipe, tokenizer, revision = _recipe_of(fields["recipe"]), fields["tokenizer"], fields["revision"]
            if not isinstance(tokenizer, str) or not isinstance(revision, str):
                raise TypeError("tokenizer and revision are texts")
            chat = fields.get("chat")
            if chat is not None:
                chat = ChatFormat(chat["templates"], chat["special_tokens"])
            return cls(model, recipe, tokenizer, revision, fingerprint, chat)
        except (zlib.error, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise MalformedMessage(f"the model card {fingerprint.hex()} is damaged: {error}") from error


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object, of: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


_FITS: dict[str, Callable[[Any], bool]] = {
    "max_length": _is_count,
    "pooling": _is_text,
    "normalize": _is_switch,
    "dimension": _is_count,
    "vocab_size": _is_count,
    "matryoshka_dims": lambda sizes: sizes is None or _is_list(sizes, _is_count),
    "truncation_side": lambda side: type(side) is int,
    "do_lower_case": _is_switch,
    "token_dimension": lambda size: size == 0 or _is_count(size),
    "prompts": lambda prompts: isinstance(prompts, dict) and all(map(_is_text, prompts.values())),
    "default_prompt": _is_text,
    "include_prompt": _is_switch,
    "adapters": lambda names: _is_list(names, _is_text),
    "default_adapter": _is_text,
    "similarity": _is_text,
    "head": _is_text,
}
"""What may stand in each field of a card's recipe, as JSON."""


def _recipe_of(fields: Any) -> Recipe:
    """A card's recipe. Fields that a later version has added are left out, those that an earlier one lacks are missing.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    said: dict[str, Any] = {name: fields[name] for name in _FITS if name in fields}
    for name, value in said.items():
        if not _FITS[name](value):
            raise TypeError(f"{name} {value!r}")
    sizes = said["matryoshka_dims"]
    said["matryoshka_dims"] = None if sizes is None else tuple(sizes)
    said["pooling"] = tuple(map(Pooling, said["pooling"].split("+")))
    said["adapters"] = tuple(said.get("adapters", ()))
    said["truncation_side"] = TruncationSide(said["truncation_side"])
    recipe = Recipe(**said)
    if recipe.default_prompt not in ("", *recipe.prompts) or recipe.default_adapter not in ("", *recipe.adapters):
        raise ValueError(f"no prompt {recipe.default_prompt!r}, or no adapter {recipe.default_adapter!r}")
    return recipe


def _fingerprint_of(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:16]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What the table of models says of a served name: the queue's name, the newest card and its number of pieces."""

    model: str
    fingerprint: str
    pieces: int

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise TypeError(f"model {self.model!r}")
        if len(bytes.fromhex(self.fingerprint)) != 16 or not 1 <= self.pieces <= _MOST_PIECES:
            raise ValueError(f"fingerprint {self.fingerprint!r}, {self.pieces!r} pieces")

    def encode(self) -> bytes:
        """JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> ModelEntry:
        """From JSON.

        Raises:
            MalformedMessage: not an entry.
        """
        return _decode(cls, data, "an entry of the table of models")


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a live consumer says of itself with each heartbeat.

    Args:
        consumer: its name in the group.
        model: first served name.
        names: all served names.
        fingerprint: its card, in hex.
        dimension: components of a full vector.
        max_length: longest sequence in tokens.
        pooling: of the recipe.
        dtype: number format of the forward pass.
        device: torch device.
        revision: of the weights.
        started_s: Unix time at which it was ready; of several cards, that of the newest consumer is current.
        pieces: of the card.
        tokens_per_s: what it computes when it has enough to do, as measured lately; 0 while nothing is known.
        pooling_source: where `pooling` was found, for people; the rest of the recipe stands on the card.
    """

    consumer: str
    model: str
    names: tuple[str, ...]
    fingerprint: str
    dimension: int
    max_length: int
    pooling: str
    dtype: str
    device: str
    revision: str
    started_s: float
    pieces: int = 1
    tokens_per_s: float = 0.0
    pooling_source: str = ""

    def __post_init__(self) -> None:
        for name in ("consumer", "pooling_source"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} {getattr(self, name)!r}")
        ModelEntry(self.model, self.fingerprint, self.pieces)
        # What is reckoned with: one number out of bounds would spoil what is known of all consumers.
        for name in ("dimension", "max_length", "started_s", "tokens_per_s"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} {getattr(self, name)!r}")

    def encode(self) -> bytes:
        """JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Announcement:
        """From JSON.

        Raises:
            MalformedMessage: not an announcement.
        """
        return _decode(cls, data, "a heartbeat")

    @property
    def card(self) -> ModelEntry:
        """Where its card is."""
        return ModelEntry(self.model, self.fingerprint, self.pieces)


def _decode(kind: type[T], data: bytes, what: str) -> T:
    """An object of a dataclass from JSON; other versions may say more, or less of what has a default."""
    try:
        value = orjson.loads(data)
        known = {name: value[name] for name in kind.__slots__ if name in value}  # type: ignore[attr-defined] # slotted
        return kind(**{name: tuple(item) if isinstance(item, list) else item for name, item in known.items()})
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise MalformedMessage(f"{what} is damaged: {error!r}") from error


class CardCache:
    """Cards on disk, one file each, named by fingerprint. A damaged or unwritable cache only costs a fetch."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder("cards")

    def load(self, fingerprint: bytes, model: str) -> ModelCard | None:
        """The card, or None when it is not here in good order."""
        if self._folder is None:
            return None
        try:
            return ModelCard.decode([(self._folder / fingerprint.hex()).read_bytes()], fingerprint, model)
        except (OSError, MalformedMessage):
            return None

    def save(self, fingerprint: bytes, pieces: list[bytes]) -> None:
        """Keep a card as it was published; written aside and renamed, so that no reader meets half a file."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(b"".join(pieces))
            Path(file.name).replace(self._folder / fingerprint.hex())
        except OSError:
            return
