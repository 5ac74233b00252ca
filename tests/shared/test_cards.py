from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from embedstream.shared.cards import PIECE_BYTES, Announcement, CardCache, ModelCard, ModelEntry
from embedstream.shared.errors import InvalidInput, MalformedMessage
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.recipe import Pooling, Recipe

RECIPE = Recipe(256, Pooling.MEAN, normalize=True, dimension=384, vocab_size=30522)
CARD = ModelCard("m", RECIPE, '{"version":"1.0"}', "abc")


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        replace(CARD, recipe=replace(RECIPE, matryoshka_dims=None, truncation_side=TruncationSide.LEFT)),
        replace(CARD, recipe=replace(RECIPE, matryoshka_dims=(64, 128), pooling=Pooling.ALL)),
    ],
)
def test_cards_round_trip(card: ModelCard) -> None:
    assert ModelCard.decode(card.encode(), card.fingerprint) == card


def test_large_cards_travel_in_pieces() -> None:
    card = replace(CARD, tokenizer=random.Random(1).randbytes(PIECE_BYTES).hex())
    pieces = card.encode()
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert ModelCard.decode(pieces, card.fingerprint) == card


@pytest.mark.parametrize(
    "other",
    [
        replace(CARD, tokenizer="{}"),
        replace(CARD, revision="abd"),
        replace(CARD, recipe=replace(RECIPE, max_length=128)),
        replace(CARD, recipe=replace(RECIPE, pooling=Pooling.CLS)),
    ],
)
def test_the_fingerprint_follows_all_that_matters(other: ModelCard) -> None:
    assert other.fingerprint != CARD.fingerprint
    with pytest.raises(MalformedMessage, match="holds"):
        ModelCard.decode(other.encode(), CARD.fingerprint)


def test_the_name_is_not_part_of_the_fingerprint() -> None:
    assert replace(CARD, model="alias").fingerprint == CARD.fingerprint


@pytest.mark.parametrize("pieces", [[], [b"junk"], [CARD.encode()[0][:-9]], [b""]])
def test_damaged_cards_are_malformed(pieces: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        ModelCard.decode(pieces, CARD.fingerprint)


def test_the_cache_keeps_cards_and_forgets_damaged_ones(tmp_path: Path) -> None:
    cache = CardCache(tmp_path / "cards")
    assert cache.load(CARD.fingerprint) is None
    cache.save(CARD)
    assert cache.load(CARD.fingerprint) == CARD
    (tmp_path / "cards" / CARD.fingerprint.hex()).write_bytes(b"half a card")
    assert cache.load(CARD.fingerprint) is None


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = CardCache(tmp_path / "file")
    cache.save(CARD)
    assert cache.load(CARD.fingerprint) is None


def test_announcements_round_trip_and_later_fields_are_ignored() -> None:
    said = Announcement("c", "m", ("m", "o/m"), "ab", 384, 256, "mean", "float32", "cpu", "abc", 1)
    assert Announcement.decode(said.encode()) == said
    assert Announcement.decode(orjson.dumps({**orjson.loads(said.encode()), "colour": "blue"})) == said


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"model":"m"}'])
def test_damaged_announcements_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        Announcement.decode(data)
    with pytest.raises(MalformedMessage):
        ModelEntry.decode(data)


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        ((), 128, "does not support Matryoshka"),
        (None, 0, r"range \[1, 384\]"),
        (None, 385, r"range \[1, 384\]"),
        ((64, 128), 100, r"\[64, 128\], got 100"),
    ],
)
def test_sizes_the_model_has_not_are_refused(sizes: tuple[int, ...] | None, asked: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        replace(RECIPE, matryoshka_dims=sizes).check_dimensions(asked, "m")
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(("sizes", "asked"), [((), None), ((), 384), (None, 1), ((64,), 64), ((64,), 384)])
def test_sizes_the_model_has_are_accepted(sizes: tuple[int, ...] | None, asked: int | None) -> None:
    replace(RECIPE, matryoshka_dims=sizes).check_dimensions(asked, "m")
