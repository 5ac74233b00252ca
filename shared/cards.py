"""Model cards: what a caller must know of a model to tokenise for it, published by consumers through Redis.

A card is the recipe and the tokenizer of one revision, named by its fingerprint. Consumers announce the fingerprint
with each heartbeat; API processes and producers fetch the card once and keep it on disk: they hold no model files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from .errors import MalformedMessage
from .jobs import TruncationSide
from .recipe import Pooling, Recipe

PIECE_BYTES = 1024 * 1024
_MAX_CARD_BYTES = 256 * 1024 * 1024  # a tokenizer of a million entries is about 40 MB of JSON


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One revision of one model.

    Args:
        model: first served name; it names the queue.
        recipe: how vectors are made, overrides of the operator included.
        tokenizer: the tokenizer as JSON of the `tokenizers` library.
        revision: commit or content hash of the weights.
        fingerprint: 16 bytes that change whenever the same text could get other tokens or another vector.
    """

    model: str
    recipe: Recipe
    tokenizer: str
    revision: str
    fingerprint: bytes = field(init=False)  # kept, because every job carries it and a tokenizer is megabytes to hash

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for part in (self.tokenizer.encode(), orjson.dumps(asdict(self.recipe)), self.revision.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        object.__setattr__(self, "fingerprint", digest.digest()[:16])

    def encode(self) -> list[bytes]:
        """The card in compressed pieces of at most 1 MiB."""
        fields = {name: value for name, value in asdict(self).items() if name != "fingerprint"}
        data = zlib.compress(orjson.dumps(fields), 6)
        return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]

    @classmethod
    def decode(cls, pieces: list[bytes], fingerprint: bytes) -> ModelCard:
        """Put the pieces together again and check that they are the card asked for.

        Raises:
            MalformedMessage: damaged, or another card.
        """
        try:
            inflater = zlib.decompressobj()
            fields = orjson.loads(inflater.decompress(b"".join(pieces), _MAX_CARD_BYTES))
            recipe = fields.pop("recipe")
            sizes = recipe["matryoshka_dims"]
            recipe["matryoshka_dims"] = None if sizes is None else tuple(sizes)
            recipe["pooling"] = Pooling(recipe["pooling"])
            recipe["truncation_side"] = TruncationSide(recipe["truncation_side"])
            card = cls(recipe=Recipe(**recipe), **fields)
        except (zlib.error, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise MalformedMessage(f"the model card {fingerprint.hex()} is damaged: {error}") from error
        if card.fingerprint != fingerprint:
            raise MalformedMessage(f"the model card {fingerprint.hex()} holds {card.fingerprint.hex()}")
        return card


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What the table of models says of a served name: the queue's name, the newest card and its number of pieces."""

    model: str
    fingerprint: str
    pieces: int

    def encode(self) -> bytes:
        """JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> ModelEntry:
        """From JSON.

        Raises:
            MalformedMessage: not an entry.
        """
        return cls(**_object(data, "an entry of the table of models", cls.__slots__))


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
        started_s: Unix time at which it was ready.
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
    started_s: int
    prompts: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Announcement:
        """From JSON.

        Raises:
            MalformedMessage: not an announcement.
        """
        fields = _object(data, "a heartbeat", cls.__slots__)
        fields["names"] = tuple(fields["names"])
        return cls(**fields)


def _object(data: bytes, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
        return {name: value[name] for name in names}  # later versions may say more
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise MalformedMessage(f"{what} is damaged: {error!r}") from error


class CardCache:
    """Cards on disk, one file each, named by fingerprint. A damaged or unwritable cache only costs a fetch."""

    def __init__(self, folder: Path | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._folder = folder or Path(base) / "embedstream" / "cards"

    def load(self, fingerprint: bytes) -> ModelCard | None:
        """The card, or None when it is not here in good order."""
        try:
            return ModelCard.decode([(self._folder / fingerprint.hex()).read_bytes()], fingerprint)
        except (OSError, MalformedMessage):
            return None

    def save(self, card: ModelCard) -> None:
        """Keep the card; written aside and renamed, so that no reader meets half a file."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(b"".join(card.encode()))
            Path(file.name).replace(self._folder / card.fingerprint.hex())
        except OSError:
            return
