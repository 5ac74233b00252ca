from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx2
import orjson
import pytest
from tests.api.conftest import RECIPE, StubProducer, served_model

from embedstream.api.prompts import with_prompt_and_adapter
from embedstream.api.schemas import EmbeddingRequest, PoolingRequest
from embedstream.producer import Options
from embedstream.shared.errors import InvalidInput, Unavailable
from embedstream.shared.recipe import NO_PROMPT

URL = "/v1/embeddings"
PROMPTS = {"query": "a b ", "passage": "c ", "same": "c ", "nothing": ""}
MODEL = served_model(
    replace(RECIPE, prompts=PROMPTS, default_prompt="passage", adapters=("retrieval.query", "sorting"))
)
BARE = served_model()


def chosen(served: Any = MODEL, kind: type[EmbeddingRequest | PoolingRequest] = EmbeddingRequest, **fields: Any) -> Any:
    """Prompt and adapter of the options for a body with these fields."""
    body = kind.parse("application/json", orjson.dumps({"input": "a", **fields}))
    options = with_prompt_and_adapter(Options(), body, served)
    return options.prompt, options.adapter


@pytest.mark.parametrize(
    ("fields", "prompt", "adapter"),
    [
        ({}, "", ""),
        ({"prompt_name": None, "input_type": None, "task": None}, "", ""),
        ({"prompt_name": ""}, NO_PROMPT, ""),
        ({"prompt_name": "query"}, "query", ""),
        ({"prompt_name": "nothing"}, "nothing", ""),
        ({"input_type": ""}, "", ""),
        ({"input_type": "search_document"}, "role:search_document", ""),
        ({"input_type": "query", "task": "sorting"}, "role:query", "sorting"),
        # the same prompt twice, by its name or its text
        ({"prompt_name": "query", "input_type": "search_query"}, "role:search_query", ""),
        ({"prompt_name": "same", "input_type": "document"}, "role:document", ""),
        ({"prompt_name": "", "input_type": "nothing"}, "role:nothing", ""),
    ],
)
def test_what_fields_ask_for(fields: dict[str, Any], prompt: str, adapter: str) -> None:
    assert chosen(**fields) == (prompt, adapter)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt_name": "poem"}, "prompt_name", r"no prompt `poem`; it has `query`, `passage`, `same`, `nothing`\."),
        (
            {"input_type": "poem"},
            "input_type",
            r"no prompt `poem`; it has `query`, .*\(parameter=input_type, value=poem\)",
        ),
        ({"prompt_name": "-"}, "prompt_name", "No prompt is named `-`"),
        ({"prompt_name": "role:query"}, "prompt_name", "none begins with `role:`"),
        ({"prompt_name": "query", "input_type": "passage"}, "prompt_name", "different prompts.*value=query"),
        ({"prompt_name": "", "input_type": "query"}, "prompt_name", "different prompts"),
        ({"prompt_name": "poem", "input_type": "query"}, "prompt_name", "no prompt `poem`"),
        ({"task": "poem"}, "task", r"null or one of `retrieval.query`, `sorting`\. \(parameter=task, value=poem\)"),
        ({"task": ""}, "task", "null or one of"),
    ],
)
def test_what_the_model_has_not_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        chosen(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("word", ["query", "search_document", "anything", "-", "role:query", "x" * 10_000])
def test_a_model_without_prompts_ignores_what_texts_are_for(word: str) -> None:
    chosen(BARE, input_type=word)


@pytest.mark.parametrize("name", ["query", "nothing"])
def test_a_model_without_prompts_has_none_of_any_name(name: str) -> None:
    assert chosen(BARE, prompt_name="") == (NO_PROMPT, "")
    with pytest.raises(InvalidInput, match="it has none"):
        chosen(BARE, prompt_name=name)


@pytest.mark.parametrize("task", ["retrieval.query", ""])
def test_a_task_needs_a_model_with_adapters(task: str) -> None:
    with pytest.raises(InvalidInput, match=rf"no adapters.* \(parameter=task, value={task}\)") as caught:
        chosen(BARE, task=task)
    assert caught.value.param == "task"


@pytest.mark.parametrize("field", ["prompt_name", "input_type", "task"])
def test_long_names_are_not_repeated(field: str) -> None:
    fields: dict[str, Any] = {field: "x" * 10_000_000}
    with pytest.raises(InvalidInput) as caught:
        chosen(**fields)
    assert len(str(caught.value)) < 600


def test_a_long_name_beside_another() -> None:
    served = served_model(replace(RECIPE, prompts={"query": "a ", "x" * 1000: "b "}))
    with pytest.raises(InvalidInput) as caught:
        chosen(served, prompt_name="query", input_type="x" * 1000)
    assert len(str(caught.value)) < 600


def test_the_task_of_pooling_is_none_of_an_adapter() -> None:
    assert chosen(kind=PoolingRequest, task="token_embed", input_type="query") == ("role:query", "")


def test_chat_messages_get_no_prompt_but_the_adapter_of_a_role() -> None:
    messages: dict[str, Any] = {"input": [{"role": "user", "content": "a"}]}
    assert chosen(**messages) == (NO_PROMPT, "")
    assert chosen(**messages, prompt_name="nothing") == (NO_PROMPT, "")
    asking: list[dict[str, Any]] = [{"prompt_name": "query"}, {"input_type": "query"}]
    for fields in asking:
        with pytest.raises(InvalidInput, match="chat template") as caught:
            chosen(**messages, **fields)
        assert caught.value.param == next(iter(fields))
    without = served_model(replace(RECIPE, adapters=("retrieval.query", "sorting"), default_adapter="sorting"))
    assert chosen(without, **messages, input_type="query") == (NO_PROMPT, "retrieval.query")
    assert chosen(without, **messages) == (NO_PROMPT, "sorting")


def test_names_wait_for_the_first_consumer() -> None:
    assert chosen(None, prompt_name="query", task="sorting") == ("query", "sorting")
    assert chosen(None, input_type="query") == ("role:query", "")
    assert chosen(None) == ("", "")
    with pytest.raises(Unavailable, match="send one of them"):
        chosen(None, prompt_name="query", input_type="query")
    with pytest.raises(InvalidInput, match="null or the name") as caught:  # as it is told when a model is known
        chosen(None, task="")
    assert caught.value.param == "task"


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 4),
        ({"prompt_name": ""}, 3),
        ({"prompt_name": "query"}, 5),
        ({"input_type": "search_query"}, 5),
        ({"input_type": "corpus"}, 4),
        ({"prompt_name": "nothing"}, 3),
    ],
)
async def test_usage_counts_the_prompt(
    client: httpx2.AsyncClient, producer: StubProducer, fields: dict[str, Any], tokens: int
) -> None:
    producer.fleet.served = MODEL
    for path in (URL, "/pooling"):
        response = await client.post(path, json={"input": ["a", "b"], **fields})
        assert response.json()["usage"]["prompt_tokens"] == 2 * tokens


async def test_length_counts_the_prompt(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.served = MODEL
    text = "a " * (RECIPE.max_length - 3)
    assert (await client.post(URL, json={"input": text})).status_code == 200
    error = (await client.post(URL, json={"input": text, "prompt_name": "query"})).json()["error"]
    assert (error["param"], error["code"]) == ("input_tokens", 400)


async def test_token_ids_get_no_prompt(client: httpx2.AsyncClient, producer: StubProducer) -> None:
    producer.fleet.served = MODEL
    ids = [[3], [4, 5]]
    for fields in ({}, {"prompt_name": ""}, {"prompt_name": "nothing"}):
        response = await client.post(URL, json={"input": ids, **fields})
        assert response.json()["usage"]["prompt_tokens"] == 3
    for fields in ({"prompt_name": "query"}, {"input_type": "document"}):
        response = await client.post(URL, json={"input": ids, **fields})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, next(iter(fields)))
    producer.fleet.served = BARE
    assert (await client.post(URL, json={"input": ids, "input_type": "document"})).status_code == 200
