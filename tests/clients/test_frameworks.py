"""What is particular to LlamaIndex, Haystack and LiteLLM."""

from __future__ import annotations

import base64
import logging
from typing import Any

import litellm
import numpy as np
import openai
import pytest
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from tests.clients.callers import Ask, haystack_of, llamaindex_of
from tests.clients.servers import MODEL, Server, assert_same


@pytest.mark.parametrize("kind", [OpenAIEmbedding, OpenAILikeEmbedding])
def test_llamaindex_queries_and_single_texts(server: Server, kind: type[Any]) -> None:
    embedder = llamaindex_of(kind, server, Ask())
    assert_same(embedder.get_query_embedding("the\nqueue"), server.embed("the queue"))
    assert_same(embedder.get_text_embedding("the queue"), server.embed("the queue"))


def test_llamaindex_passes_our_own_fields(server: Server) -> None:
    options = {"additional_kwargs": {"extra_body": {"truncate_prompt_tokens": -1}}}
    embedder = llamaindex_of(OpenAILikeEmbedding, server, Ask(), **options)
    long = "word " * 400
    assert_same(embedder.get_text_embedding(long), server.embed(long, truncate_prompt_tokens=-1))


def test_haystack_leaves_a_failed_batch_without_vectors(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """What the page warns of: no error, and the neighbours of one long text pay for it."""
    embedder = haystack_of(OpenAIDocumentEmbedder, server, Ask(), progress_bar=False, batch_size=2)
    documents = [Document(content=text) for text in ("a", "word " * 400, "b", "")]
    with caplog.at_level(logging.ERROR):
        answer = embedder.run(documents)
    vectors = [document.embedding for document in answer["documents"]]
    assert vectors[:2] == [None, None]
    assert_same(vectors[2:], server.embed(["b", ""]))
    assert "maximum context length is 256 tokens" in caplog.text
    embedder.close()


def test_haystack_tells_model_and_usage(server: Server) -> None:
    embedder = haystack_of(OpenAIDocumentEmbedder, server, Ask(), progress_bar=False, batch_size=1)
    meta = embedder.run([Document(content="the queue"), Document(content="a")])["meta"]
    assert meta["model"] == MODEL
    assert meta["usage"]["prompt_tokens"] == meta["usage"]["total_tokens"] == 4 + 3
    embedder.close()


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("form", [None, "float", "base64"])
def test_litellm_asks_for_every_form(server: Server, provider: str, form: str | None) -> None:
    answer = litellm.embedding(
        model=f"{provider}/{MODEL}",
        input=["the queue", ""],
        api_base=server.base_url,
        api_key=server.key,
        encoding_format=form,
    )
    vectors = [item["embedding"] for item in answer.data]
    if form == "base64":  # it hands the texts through
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    assert_same(vectors, server.embed(["the queue", ""]))
    assert answer.usage.prompt_tokens == 4 + 2


@pytest.mark.parametrize("field", ["encoding_format", "dimensions", "user", "truncate_prompt_tokens", "normalize"])
def test_a_null_of_litellm_counts_as_absent(server: Server, field: str) -> None:
    answer = litellm.embedding(
        model=f"openai/{MODEL}",
        input=["the queue"],
        api_base=server.base_url,
        api_key=server.key,
        extra_body={field: None},
    )
    assert_same([item["embedding"] for item in answer.data], server.embed("the queue"))


def test_litellm_names_our_error(server: Server) -> None:
    with pytest.raises(litellm.BadRequestError, match="Token id 99999 is out of vocabulary"):
        litellm.embedding(model=f"openai/{MODEL}", input=[[99999]], api_base=server.base_url, api_key=server.key)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        litellm.embedding(model="hosted_vllm/gpt-9", input=["a"], api_base=server.base_url, api_key=server.key)
