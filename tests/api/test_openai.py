"""The official client against the app on a real socket."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from tests.api.conftest import StubFleet, StubProducer, vectors_of

from embedstream.api import create_app
from embedstream.api.server import bound_to
from embedstream.producer import Embeddings, Prepared
from embedstream.shared.errors import JobFailed, Overloaded, ResultTimeout, Unavailable
from embedstream.shared.settings import Settings


class Moody(StubProducer):
    """A producer that raises what is in the list, one error a request, before it computes again."""

    def __init__(self, fleet: StubFleet) -> None:
        super().__init__(fleet)
        self.errors: list[Exception] = []
        self.asked_s: list[float] = []

    async def run(self, prepared: Prepared) -> Embeddings:
        self.asked_s.append(time.monotonic())
        self.error = self.errors.pop(0) if self.errors else None
        return await super().run(prepared)


@pytest.fixture
def producer() -> Moody:
    return Moody(StubFleet())


@pytest.fixture
def url(producer: Moody) -> Iterator[str]:
    settings = Settings(api_key=("key-1", "key-2"), payload_limit=100_000)
    app: Starlette = create_app(settings, producer)
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait here until the server takes them
    server = uvicorn.Server(
        uvicorn.Config(app, http=bound_to(settings), log_config=None, access_log=False, ws="none", lifespan="on")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client_of(url: str, key: str = "key-2", **options: Any) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)  # no proxy of the machine between the two
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http, **{"max_retries": 1, **options})


def async_client_of(url: str) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key-1", http_client=http, max_retries=1)


def test_openai_client(url: str, producer: Moody) -> None:
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


async def test_openai_client_async(url: str, producer: Moody) -> None:
    async with async_client_of(url) as client:
        response = await client.embeddings.create(model="tiny", input="a b")
        np.testing.assert_array_equal(np.array(response.data[0].embedding, np.float32), vectors_of(producer.runs[0])[0])
        assert [model.id async for model in client.models.list()] == ["tiny", "owner/tiny"]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.embeddings.create(model="other", input="a")


async def test_many_requests_of_one_async_client(url: str) -> None:
    texts = [" ".join(["a", "b", "c"][: 1 + number % 3]) for number in range(60)]
    async with async_client_of(url) as client:
        alone = {text: (await client.embeddings.create(model="tiny", input=text)).data[0] for text in set(texts)}
        answers = await asyncio.gather(*(client.embeddings.create(model="tiny", input=[text, "d"]) for text in texts))
    for text, answer in zip(texts, answers, strict=True):
        assert answer.data[0].embedding == alone[text].embedding
        assert [item.index for item in answer.data] == [0, 1]


@pytest.mark.parametrize("form", [None, "float", "base64"])
def test_all_inputs_that_the_client_knows(url: str, producer: Moody, form: Any) -> None:
    options = {} if form is None else {"encoding_format": form}
    inputs: list[Any] = ["a", ["a", "", "b c"], [3, 4], [[3], [4, 5, 6]]]
    with client_of(url) as client:
        for given in inputs:
            response = client.embeddings.create(model="tiny", input=given, **options)
            vectors = [item.embedding for item in response.data]
            if form == "base64":  # asked for by name, the text is the client's caller's
                vectors = [np.frombuffer(base64.b64decode(str(text)), "<f4").tolist() for text in vectors]
            np.testing.assert_array_equal(np.array(vectors, np.float32), vectors_of(producer.runs[-1]))
            assert response.usage.total_tokens == producer.runs[-1].n_tokens
        with pytest.raises(openai.BadRequestError, match="at least one prompt"):
            client.embeddings.create(model="tiny", input=[])
        with pytest.raises(openai.BadRequestError, match="cannot be empty"):
            client.embeddings.create(model="tiny", input=[[3], []])


@pytest.mark.parametrize(
    "field", ["encoding_format", "dimensions", "user", "truncate_prompt_tokens", "normalize", "model", "task"]
)
def test_a_null_counts_as_absent(url: str, producer: Moody, field: str) -> None:
    with client_of(url) as client:
        plain = client.embeddings.create(model="tiny", input=["a b"], encoding_format="float")
        # LiteLLM sends such nulls; without `encoding_format` the form is float
        nulls = {"encoding_format": "float", field: None}
        again = client.embeddings.create(model="tiny", input=["a b"], extra_body=nulls)
    assert again.data == plain.data
    assert producer.runs[0].options == producer.runs[1].options


def test_our_own_fields_and_forms_go_into_extra_body(url: str, producer: Moody) -> None:
    with client_of(url) as client:
        cut = client.embeddings.with_raw_response.create(
            model="tiny", input="a b c d e f g h a b c", extra_body={"truncate_prompt_tokens": -1}
        )
        assert cut.headers["x-truncated-inputs"] == "1"
        assert cut.parse().usage.prompt_tokens == 10
        packed = client.embeddings.with_raw_response.create(
            model="tiny", input=["a", "b c"], extra_body={"encoding_format": "bytes_only", "embed_dtype": "float16"}
        )
        vectors = np.frombuffer(packed.content, "<f2").reshape(2, -1)
        np.testing.assert_array_equal(vectors, vectors_of(producer.runs[-1]))


def test_inputs_that_fail_alone_leave_the_others_their_vectors(url: str, producer: Moody) -> None:
    with client_of(url) as client:
        for form in ("float", "base64"):
            raw = client.embeddings.with_raw_response.create(
                model="tiny",
                input=["a b", "a " * 20, "c"],
                encoding_format=form,
                extra_headers={"x-on-error": "partial"},
            )
            kinds = [item["object"] for item in raw.http_response.json()["data"]]
            assert kinds == ["embedding", "error", "embedding"]
            answer = raw.parse()  # the client takes it, and passes the error on
            assert [item.object for item in answer.data] == kinds
            assert "maximum context length" in str(answer.data[1].model_extra)
        answer = client.embeddings.create(
            model="tiny", input=["a b", "a " * 20, "c"], extra_headers={"x-on-error": "partial"}
        )
        expected = vectors_of(producer.runs[-1])
        np.testing.assert_array_equal(np.array(answer.data[0].embedding, np.float32), expected[0])
        assert "maximum context length" in str(answer.data[1].model_extra)


def test_the_client_retries_what_may_succeed_and_nothing_else(url: str, producer: Moody) -> None:
    with client_of(url) as client:
        producer.errors = [JobFailed("The job was given up.")]
        with pytest.raises(openai.InternalServerError, match="given up"):
            client.embeddings.create(model="tiny", input="a")
        assert len(producer.runs) == 1
        producer.errors = [ResultTimeout("No complete result within 60.0 s.")] * 2
        with pytest.raises(openai.InternalServerError, match="No complete result"):
            client.embeddings.create(model="tiny", input="a")
        assert len(producer.runs) == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("The predicted wait of 30 s exceeds 10 s.", retry_after_s=1.5), openai.RateLimitError),
        (Unavailable("No consumer is alive.", retry_after_s=1.5), openai.InternalServerError),
    ],
)
def test_the_client_waits_as_long_as_it_is_told(
    url: str, producer: Moody, error: Exception, kind: type[openai.APIStatusError]
) -> None:
    with client_of(url) as client:
        producer.errors = [error]
        response = client.embeddings.create(model="tiny", input="a")
        np.testing.assert_array_equal(
            np.array(response.data[0].embedding, np.float32), vectors_of(producer.runs[-1])[0]
        )
        first, second = producer.asked_s
        assert second - first >= 2  # whole seconds, rounded up; by itself it would wait for one at most
    with client_of(url, max_retries=0) as client:
        producer.errors = [error]
        with pytest.raises(kind, match=str(error)) as caught:
            client.embeddings.create(model="tiny", input="a")
        assert caught.value.response.headers["retry-after"] == "2"
        assert "x-should-retry" not in caught.value.response.headers


def test_the_clients_timeout_is_the_requests_deadline(url: str, producer: Moody) -> None:
    with client_of(url, timeout=7.5) as client:
        client.embeddings.create(model="tiny", input="a")
        client.with_options(timeout=3).embeddings.create(model="tiny", input="a")
    assert [prepared.options.timeout_s for prepared in producer.runs] == [7.5, 3]


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
