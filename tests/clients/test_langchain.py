"""LangChain as it is by default: token ids of cl100k_base, cut and averaged by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
import tiktoken
from tests.clients.callers import Ask, langchain_of
from tests.clients.servers import Server, assert_same

TEXTS = ["the queue", "ünïcödé 🎉 👩‍👩‍👧 日本語", "  two\n\n\tparagraphs ", "<|endoftext|>", "a"]
ids_by_default: dict[str, Any] = {"check_embedding_ctx_length": True}


def test_ids_are_read_as_the_texts_they_were_made_of(cl100k_server: Server) -> None:
    embeddings = langchain_of(cl100k_server, Ask(), **ids_by_default)
    assert_same(embeddings.embed_documents(TEXTS), cl100k_server.embed(TEXTS))
    assert_same(embeddings.embed_query(TEXTS[0]), cl100k_server.embed(TEXTS[:1]))


async def test_ids_by_the_async_client(cl100k_server: Server) -> None:
    embeddings = langchain_of(cl100k_server, Ask(), **ids_by_default)
    assert_same(await embeddings.aembed_documents(TEXTS), cl100k_server.embed(TEXTS))


@pytest.mark.parametrize("options", [ids_by_default, {}], ids=["ids", "texts"])
def test_empty_texts(cl100k_server: Server, options: dict[str, Any]) -> None:
    texts = ["", "the queue", ""]
    vectors = langchain_of(cl100k_server, Ask(), **options).embed_documents(texts)
    assert_same(vectors, cl100k_server.embed(texts))


def test_usage_counts_the_models_tokens(cl100k_server: Server) -> None:
    cl100k = tiktoken.get_encoding("cl100k_base")
    with openai.OpenAI(base_url=cl100k_server.base_url, api_key=cl100k_server.key) as client:
        of_ids = client.embeddings.create(model="", input=[cl100k.encode_ordinary(text) for text in TEXTS])
        of_texts = client.embeddings.create(model="", input=TEXTS)
    assert of_ids.usage == of_texts.usage


def test_several_requests_of_one_batch(cl100k_server: Server) -> None:
    texts = [f"text number {number}" for number in range(25)]
    embeddings = langchain_of(cl100k_server, Ask(), chunk_size=10, **ids_by_default)
    assert_same(embeddings.embed_documents(texts), cl100k_server.embed(texts))


def test_a_long_text_in_one_piece_is_chunked_by_the_server(cl100k_server: Server) -> None:
    long = "the queue holds a vector for each text " * 100
    embeddings = langchain_of(cl100k_server, Ask(), **ids_by_default)
    assert_same(embeddings.embed_documents([long, "short"]), cl100k_server.embed([long, "short"]))


def test_a_long_text_in_pieces_is_averaged_by_the_client(server: Server, cl100k_server: Server) -> None:
    cl100k = tiktoken.get_encoding("cl100k_base")
    long = "the queue holds a vector for each text " * 60
    ids = cl100k.encode_ordinary(long)
    pieces = [ids[start : start + 200] for start in range(0, len(ids), 200)]
    assert len(pieces) > 2
    vectors = server.embed([cl100k.decode(piece) for piece in pieces])
    mean = np.average(vectors, axis=0, weights=[len(piece) for piece in pieces])
    embeddings = langchain_of(cl100k_server, Ask(), embedding_ctx_length=200, **ids_by_default)
    assert_same(embeddings.embed_documents([long]), (mean / np.linalg.norm(mean))[np.newaxis].astype(np.float32))


def test_a_character_cut_in_two_is_no_error(cl100k_server: Server) -> None:
    embeddings = langchain_of(cl100k_server, Ask(), embedding_ctx_length=2, **ids_by_default)
    assert len(embeddings.embed_documents(["🧿🧿🧿"])[0]) == 384


def test_without_the_setting_foreign_ids_are_refused_with_what_to_do(server: Server) -> None:
    embeddings = langchain_of(server, Ask(retries=2), **ids_by_default)
    before = server.answers(400)
    with pytest.raises(openai.BadRequestError) as caught:
        embeddings.embed_documents(["the queue", "ünïcödé"])
    assert server.answers(400) == before + 1
    for words in ("is out of vocabulary", "input at index 1", "check_embedding_ctx_length=False", "--token-ids cl100k"):
        assert words in str(caught.value)


def test_ids_that_happen_to_be_in_range_cannot_be_noticed(server: Server) -> None:
    """Why the page tells people to send texts: this is a vector, and not that of the text."""
    vector = langchain_of(server, Ask(), **ids_by_default).embed_query("the queue")
    assert float(np.dot(vector, server.embed("the queue")[0])) < 0.5
