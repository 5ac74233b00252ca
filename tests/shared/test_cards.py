from __future__ import annotations

import hashlib
import math
import random
import zlib
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from embedstream.shared.cards import PIECE_BYTES, Announcement, CardCache, ChatFormat, ModelCard, ModelEntry
from embedstream.shared.errors import InvalidInput, MalformedMessage
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.recipe import Pooling, Recipe

RECIPE = Recipe(256, (Pooling.MEAN,), normalize=True, dimension=384, vocab_size=30522)
RICH = replace(
    RECIPE,
    pooling=(Pooling.CLS, Pooling.MEAN),
    token_dimension=192,
    prompts={"query": "query: ", "document": ""},
    default_prompt="query",
    include_prompt=False,
    adapters=("retrieval.query", "sts"),
    default_adapter="sts",
    similarity="dot",
    head="dense 384>384 tanh",
)
CARD = ModelCard("m", RECIPE, '{"version":"1.0"}', "abc")
CHAT = ChatFormat({"default": "{{ messages }}", "rag": "é"}, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        ModelCard("m", replace(RECIPE, matryoshka_dims=None, truncation_side=TruncationSide.LEFT), "{}", "abc"),
        ModelCard("m", replace(RECIPE, matryoshka_dims=(64, 128), pooling=(Pooling.ALL,)), "{}", "abc"),
        ModelCard("m", RECIPE, "{}", "abc", chat=CHAT),
        ModelCard("m", RICH, "{}", "abc"),
    ],
)
def test_cards_round_trip(card: ModelCard) -> None:
    assert ModelCard.decode(card.encode(), card.fingerprint, card.model) == card


def test_large_cards_travel_in_pieces() -> None:
    card = ModelCard("m", RECIPE, random.Random(1).randbytes(PIECE_BYTES).hex(), "abc")
    pieces = card.encode()
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert ModelCard.decode(pieces, card.fingerprint, card.model) == card


@pytest.mark.parametrize(
    "other",
    [
        ModelCard("m", RECIPE, "{}", "abc"),
        ModelCard("m", RECIPE, CARD.tokenizer, "abd"),
        ModelCard("m", replace(RECIPE, max_length=128), CARD.tokenizer, "abc"),
        ModelCard("m", replace(RECIPE, pooling=(Pooling.CLS,)), CARD.tokenizer, "abc"),
        ModelCard("m", RECIPE, CARD.tokenizer, "abc", chat=CHAT),
        ModelCard("m", replace(RECIPE, prompts={"query": "q: "}), CARD.tokenizer, "abc"),
    ],
)
def test_the_fingerprint_follows_all_that_matters(other: ModelCard) -> None:
    assert other.fingerprint != CARD.fingerprint
    with pytest.raises(MalformedMessage, match="holds"):
        ModelCard.decode(other.encode(), CARD.fingerprint, CARD.model)


def test_neither_names_nor_origins_are_part_of_the_fingerprint() -> None:
    other = ModelCard("alias", replace(RECIPE, pooling_source="override"), CARD.tokenizer, CARD.revision)
    assert other.fingerprint == CARD.fingerprint


OF_LATER_VERSIONS = (
    "do_lower_case",
    "token_dimension",
    "prompts",
    "default_prompt",
    "include_prompt",
    "adapters",
    "default_adapter",
    "similarity",
    "head",
)


def published(fields: object) -> tuple[list[bytes], bytes]:
    """Pieces and fingerprint of a card, as another version may publish them."""
    payload = orjson.dumps(fields)
    return [zlib.compress(payload)], hashlib.sha256(payload).digest()[:16]


def test_cards_of_other_versions_are_read() -> None:
    """A newer consumer may say more, an older one less; what is hashed is what was published."""
    fields = orjson.loads(zlib.decompress(CARD.encode()[0]))
    fields["colour"], fields["recipe"]["shade"] = "blue", "dark"
    for later in OF_LATER_VERSIONS:
        del fields["recipe"][later]
    pieces, fingerprint = published(fields)
    card = ModelCard.decode(pieces, fingerprint, "m")
    assert (card.recipe, card.fingerprint) == (RECIPE, fingerprint)
    fields["version"] = 2
    with pytest.raises(MalformedMessage, match="version 2"):
        ModelCard.decode(*published(fields), "m")


def test_the_fingerprint_of_a_model_without_chat_is_that_of_earlier_versions() -> None:
    fields = orjson.loads(zlib.decompress(CARD.encode()[0]))
    assert fields.keys() == {"version", "recipe", "tokenizer", "revision"}
    assert published(fields)[1] == CARD.fingerprint
    assert (
        replace(CARD, fingerprint=b"", chat=CHAT).fingerprint
        != replace(CARD, fingerprint=b"", chat=replace(CHAT, special_tokens={})).fingerprint
    )


@pytest.mark.parametrize(
    "chat",
    [
        "{{ messages }}",
        {},
        {"templates": {}},
        {"templates": {"default": 5}, "special_tokens": {}},
        {"templates": {}, "special_tokens": [["bos_token", "<s>"]]},
    ],
)
def test_damaged_chat_formats_are_malformed(chat: object) -> None:
    fields = orjson.loads(zlib.decompress(CARD.encode()[0])) | {"chat": chat}
    pieces, fingerprint = published(fields)
    with pytest.raises(MalformedMessage, match="damaged"):
        ModelCard.decode(pieces, fingerprint, "m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 0),
        ("max_length", "256"),
        ("dimension", 384.0),
        ("vocab_size", True),
        ("token_dimension", -1),
        ("pooling", 7),
        ("pooling", "cls+median"),
        ("normalize", 1),
        ("include_prompt", None),
        ("matryoshka_dims", [64, "128"]),
        ("matryoshka_dims", "any"),
        ("truncation_side", 9),
        ("truncation_side", {}),
        ("prompts", ["query: "]),
        ("prompts", {"query": 7}),
        ("default_prompt", ["query"]),
        ("default_prompt", "query"),
        ("adapters", "sts"),
        ("adapters", [7]),
        ("default_adapter", "sts"),
        ("head", None),
    ],
)
def test_damaged_recipes_are_malformed(name: str, value: object) -> None:
    fields = orjson.loads(zlib.decompress(CARD.encode()[0]))
    fields["recipe"][name] = value
    with pytest.raises(MalformedMessage, match="damaged"):
        ModelCard.decode(*published(fields), "m")


@pytest.mark.parametrize(
    "changes", [{"recipe": []}, {"recipe": "none"}, {"recipe": {}}, {"tokenizer": {}}, {"revision": None}]
)
def test_cards_without_a_recipe_or_tokenizer_are_malformed(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage, match="damaged"):
        ModelCard.decode(*published(orjson.loads(zlib.decompress(CARD.encode()[0])) | changes), "m")


@pytest.mark.parametrize("pieces", [[], [b"junk"], [CARD.encode()[0][:-9]], [b""]])
def test_damaged_cards_are_malformed(pieces: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        ModelCard.decode(pieces, CARD.fingerprint, CARD.model)


def test_the_cache_keeps_cards_and_forgets_damaged_ones(tmp_path: Path) -> None:
    cache = CardCache(tmp_path / "cards")
    assert cache.load(CARD.fingerprint, CARD.model) is None
    cache.save(CARD.fingerprint, CARD.encode())
    assert cache.load(CARD.fingerprint, CARD.model) == CARD
    (tmp_path / "cards" / CARD.fingerprint.hex()).write_bytes(b"half a card")
    assert cache.load(CARD.fingerprint, CARD.model) is None


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = CardCache(tmp_path / "file")
    cache.save(CARD.fingerprint, CARD.encode())
    assert cache.load(CARD.fingerprint, CARD.model) is None


def test_announcements_round_trip_and_later_fields_are_ignored() -> None:
    said = Announcement("c", "m", ("m", "o/m"), "ab" * 16, 384, 256, "mean", "float32", "cpu", "abc", 1)
    assert Announcement.decode(said.encode()) == said
    fields = orjson.loads(said.encode())
    assert Announcement.decode(orjson.dumps({**fields, "colour": "blue", "prompts": {"query": "q: "}})) == said
    del fields["pooling_source"]
    assert Announcement.decode(orjson.dumps(fields)) == said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens_per_s", -1),
        ("tokens_per_s", 1e300),
        ("tokens_per_s", None),
        ("tokens_per_s", "fast"),
        ("started_s", -5.0),
        ("dimension", -384),
        ("max_length", []),
        ("pieces", 0),
        ("pieces", 10**9),
        ("fingerprint", "ab"),
        ("fingerprint", 7),
        ("model", 7),
        ("consumer", {}),
        ("pooling_source", 7),
    ],
)
def test_announcements_that_cannot_be_reckoned_with_are_malformed(name: str, value: object) -> None:
    said = Announcement("c", "m", ("m",), "ab" * 16, 384, 256, "mean", "float32", "cpu", "abc", 1)
    with pytest.raises(MalformedMessage, match="heartbeat is damaged"):
        Announcement.decode(orjson.dumps({**orjson.loads(said.encode()), name: value}))


@pytest.mark.parametrize("speed", [math.nan, math.inf])
def test_what_is_no_number_is_not_announced(speed: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_s"):
        Announcement("c", "m", ("m",), "ab" * 16, 384, 256, "mean", "float32", "cpu", "abc", 1, tokens_per_s=speed)


@pytest.mark.parametrize(
    "data", [b'{"model":"m","fingerprint":"xyz","pieces":1}', b'{"model":"m","fingerprint":"00","pieces":1}']
)
def test_entries_without_a_fingerprint_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        ModelEntry.decode(data)


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
