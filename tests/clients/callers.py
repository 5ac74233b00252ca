"""The clients, each in the way its own documentation shows, behind one function: texts in, vectors out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Read when the clients are imported: nothing of theirs is to leave this machine.
os.environ |= {
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "*",
}

import litellm
import openai
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from tests.clients.servers import MODEL, Server

litellm.suppress_debug_info = True


@dataclass(frozen=True)
class Ask:
    """What a test wants of a client; None leaves it to the client.

    Args:
        key: sent instead of the server's own.
        model: asked for.
        dimensions: size of the vectors.
        retries: how often the client may try again.
        timeout_s: how long it waits.
    """

    key: str | None = None
    model: str = MODEL
    dimensions: int | None = None
    retries: int = 0
    timeout_s: float = 60.0


Texts = Sequence[str]
Vectors = Sequence[Sequence[float]]
Embed = Callable[[Server, Texts, Ask], Awaitable[Vectors]]


@dataclass(frozen=True)
class Caller:
    """One client.

    Args:
        name: for the test's id; also of its own key with a quota.
        embed: texts to vectors.
        newlines: whether it sends texts as they are; LlamaIndex turns line ends into spaces.
        waits: whether it tries again, after as long as `Retry-After` says.
        insists: it tries again even when it is told not to: LiteLLM takes 0 for its default of 2.
    """

    name: str
    embed: Embed
    newlines: bool = True
    waits: bool = True
    insists: bool = False

    def __str__(self) -> str:
        return self.name


def _in_a_thread(function: Callable[[Server, Texts, Ask], Vectors]) -> Embed:
    async def embed(server: Server, texts: Texts, ask: Ask) -> Vectors:
        return await asyncio.to_thread(function, server, texts, ask)

    return embed


def _openai(server: Server, texts: Texts, ask: Ask) -> Vectors:
    with openai.OpenAI(
        base_url=server.base_url, api_key=ask.key or server.key, max_retries=ask.retries, timeout=ask.timeout_s
    ) as client:
        size = openai.omit if ask.dimensions is None else ask.dimensions
        answer = client.embeddings.create(model=ask.model, input=list(texts), dimensions=size)
    return [item.embedding for item in answer.data]


async def _openai_async(server: Server, texts: Texts, ask: Ask) -> Vectors:
    async with openai.AsyncOpenAI(
        base_url=server.base_url, api_key=ask.key or server.key, max_retries=ask.retries, timeout=ask.timeout_s
    ) as client:
        size = openai.omit if ask.dimensions is None else ask.dimensions
        answer = await client.embeddings.create(model=ask.model, input=list(texts), dimensions=size)
    return [item.embedding for item in answer.data]


def langchain_of(server: Server, ask: Ask, **options: Any) -> OpenAIEmbeddings:
    """LangChain's class, sending texts unless the options say otherwise."""
    return OpenAIEmbeddings(
        model=ask.model,
        base_url=server.base_url,
        api_key=ask.key or server.key,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
        dimensions=ask.dimensions,
        **({"check_embedding_ctx_length": False} | options),
    )


def _langchain(server: Server, texts: Texts, ask: Ask) -> Vectors:
    vectors: Vectors = langchain_of(server, ask).embed_documents(list(texts))
    return vectors


async def _langchain_async(server: Server, texts: Texts, ask: Ask) -> Vectors:
    vectors: Vectors = await langchain_of(server, ask).aembed_documents(list(texts))
    return vectors


def llamaindex_of(kind: type[Any], server: Server, ask: Ask, **options: Any) -> Any:
    """One of LlamaIndex's two classes."""
    return kind(
        model_name=ask.model,
        api_base=server.base_url,
        api_key=ask.key or server.key,
        dimensions=ask.dimensions,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
        **options,
    )


def _llamaindex(server: Server, texts: Texts, ask: Ask) -> Vectors:
    vectors: Vectors = llamaindex_of(OpenAIEmbedding, server, ask).get_text_embedding_batch(list(texts))
    return vectors


async def _llamaindex_like(server: Server, texts: Texts, ask: Ask) -> Vectors:
    embedder = llamaindex_of(OpenAILikeEmbedding, server, ask)
    vectors: Vectors = await embedder.aget_text_embedding_batch(list(texts))
    return vectors


def haystack_of(kind: type[Any], server: Server, ask: Ask, **options: Any) -> Any:
    """One of Haystack's two components."""
    return kind(
        model=ask.model,
        api_base_url=server.base_url,
        api_key=Secret.from_token(ask.key or server.key),
        dimensions=ask.dimensions,
        max_retries=ask.retries,
        timeout=ask.timeout_s,
        **options,
    )


def _haystack_texts(server: Server, texts: Texts, ask: Ask) -> Vectors:
    embedder = haystack_of(OpenAITextEmbedder, server, ask)
    try:
        return [embedder.run(text)["embedding"] for text in texts]
    finally:
        embedder.close()


async def _haystack_documents(server: Server, texts: Texts, ask: Ask) -> Vectors:
    embedder = haystack_of(OpenAIDocumentEmbedder, server, ask, progress_bar=False, raise_on_failure=True)
    try:
        documents = [Document(id=str(place), content=text) for place, text in enumerate(texts)]
        return [document.embedding for document in (await embedder.run_async(documents))["documents"]]
    finally:
        await embedder.close_async()


def _litellm_options(provider: str, server: Server, texts: Texts, ask: Ask) -> dict[str, Any]:
    options: dict[str, Any] = {"max_retries": ask.retries} if provider == "openai" else {}
    if ask.dimensions is not None:
        # Without the second, LiteLLM passes `dimensions` only to models whose names it knows.
        options |= {"dimensions": ask.dimensions, "allowed_openai_params": ["dimensions"]}
    return {
        "model": f"{provider}/{ask.model}",
        "input": list(texts),
        "api_base": server.base_url,
        "api_key": ask.key or server.key,
        "timeout": ask.timeout_s,
        **options,
    }


def _litellm(server: Server, texts: Texts, ask: Ask) -> Vectors:
    answer = litellm.embedding(**_litellm_options("openai", server, texts, ask))
    return [item["embedding"] for item in answer.data]


async def _litellm_async(server: Server, texts: Texts, ask: Ask) -> Vectors:
    answer = await litellm.aembedding(**_litellm_options("openai", server, texts, ask))
    return [item["embedding"] for item in answer.data]


async def _litellm_vllm(server: Server, texts: Texts, ask: Ask) -> Vectors:
    answer = await litellm.aembedding(**_litellm_options("hosted_vllm", server, texts, ask))
    return [item["embedding"] for item in answer.data]


CALLERS = [
    Caller("openai", _in_a_thread(_openai)),
    Caller("openai-async", _openai_async),
    Caller("langchain", _in_a_thread(_langchain)),
    Caller("langchain-async", _langchain_async),
    Caller("llamaindex", _in_a_thread(_llamaindex), newlines=False),
    Caller("llamaindex-like-async", _llamaindex_like, newlines=False),
    Caller("haystack-texts", _in_a_thread(_haystack_texts)),
    Caller("haystack-documents-async", _haystack_documents),
    Caller("litellm", _in_a_thread(_litellm), insists=True),
    Caller("litellm-async", _litellm_async, insists=True),
    Caller("litellm-vllm-async", _litellm_vllm, waits=False),
]
