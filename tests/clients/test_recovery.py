"""A client that was told to come again is served when the first consumer is up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
from tests.clients.deployment import Deployment
from tests.clients.servers import MODEL, Server, assert_same


def test_retries_last_until_a_consumer_is_there(server: Server, deployment: Deployment) -> None:
    late = deployment.api("--key-prefix", "late", "--model", MODEL)

    def ask() -> list[float]:
        with openai.OpenAI(base_url=late.base_url, api_key=late.key, max_retries=30) as client:
            return client.embeddings.create(model=MODEL, input="the queue").data[0].embedding

    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask)
        deployment.consumer("--key-prefix", "late")
        assert_same(answer.result(timeout=120), server.embed("the queue"))
    assert late.answers(503) > 0
    assert late.answers(200) == 1
