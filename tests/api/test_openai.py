"""The official client against the app on a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from tests.api.conftest import StubProducer, vectors_of

from embedstream.api import create_app
from embedstream.shared.errors import JobFailed, ResultTimeout
from embedstream.shared.settings import Settings


@pytest.fixture
def url(producer: StubProducer) -> Iterator[str]:
    app: Starlette = create_app(Settings(api_key=("key-1", "key-2"), payload_limit=100_000), producer)
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait here until the server takes them
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client_of(url: str, key: str = "key-2") -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)  # no proxy of the machine between the two
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http, max_retries=1)


def test_openai_client(url: str, producer: StubProducer) -> None:
    with client_of(url) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "owner/tiny"]
        assert client.models.retrieve("owner/tiny").owned_by == "embedstream"

        response = client.embeddings.create(model="tiny", input=["a b", "c"])  # asks for base64 by itself
        expected = vectors_of(producer.runs[0])
        np.testing.assert_array_equal(np.array([item.embedding for item in response.data], np.float32), expected)
        assert response.usage.prompt_tokens == 7

        for form in ("float", "base64"):
            again = client.embeddings.create(model="tiny", input=[[3, 4]], encoding_format=form, dimensions=4)
            assert len(again.data) == 1
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.embeddings.create(model="other", input="a")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.embeddings.create(model="tiny", input="a " * 20)
        with pytest.raises(openai.APIStatusError, match="at most 100000 are allowed") as caught:
            client.embeddings.create(model="tiny", input="a" * 200_000)
        assert caught.value.status_code == 413
    with client_of(url, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.embeddings.create(model="tiny", input="a")


async def test_openai_client_async(url: str, producer: StubProducer) -> None:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key-1", http_client=http) as client:
        response = await client.embeddings.create(model="tiny", input="a b")
        np.testing.assert_array_equal(np.array(response.data[0].embedding, np.float32), vectors_of(producer.runs[0])[0])


def test_the_client_retries_what_may_succeed_and_nothing_else(url: str, producer: StubProducer) -> None:
    with client_of(url) as client:
        producer.error = JobFailed("The job was given up.")
        with pytest.raises(openai.InternalServerError, match="given up"):
            client.embeddings.create(model="tiny", input="a")
        assert len(producer.runs) == 1
        producer.error = ResultTimeout("No complete result within 60.0 s.")
        with pytest.raises(openai.InternalServerError, match="No complete result"):
            client.embeddings.create(model="tiny", input="a")
        assert len(producer.runs) == 3


def test_a_body_above_the_limit_is_answered_over_a_socket(url: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"input": "'
        for _ in range(300):
            yield b"a" * 1000
        yield b'"}'

    headers = {"authorization": "Bearer key-1", "content-type": "application/json"}
    with httpx2.Client(trust_env=False) as client:
        response = client.post(f"{url}/v1/embeddings", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert client.get(f"{url}/health").status_code == 200
