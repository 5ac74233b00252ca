from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from embedstream.api.docs_page import page
from embedstream.api.errors import TABLE
from embedstream.api.openapi import document
from embedstream.api.schemas import EmbeddingRequest
from embedstream.shared.settings import Settings


def resolved(described: dict[str, Any], name: str) -> dict[str, Any]:
    schema: dict[str, Any] = described["components"]["schemas"][name]
    return schema


def validator(described: dict[str, Any], name: str) -> Any:
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    return jsonschema_rs.Draft202012Validator(schema)


async def test_it_is_served_as_json(client: httpx2.AsyncClient) -> None:
    response = await client.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == document(Settings())
    assert response.json()["openapi"] == "3.1.0"


def test_every_route_is_described(app: Starlette) -> None:
    routes = [route for route in app.routes if isinstance(route, Route)]
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    paths = document(Settings())["paths"]
    assert {(path, method) for path, item in paths.items() for method in item} == served


def test_every_field_of_a_request_is_described() -> None:
    schema = resolved(document(Settings()), "EmbeddingRequest")
    assert schema["properties"].keys() == EmbeddingRequest.model_fields.keys()
    assert all(len(field["description"]) > 10 for field in schema["properties"].values())


def test_every_status_of_an_error_is_described() -> None:
    described = document(Settings())
    for row in TABLE.values():
        schema = resolved(described, f"Error{row.status}")
        assert row.type in schema["properties"]["error"]["properties"]["type"]["enum"]


@pytest.mark.parametrize(
    "body",
    [
        {"input": "a"},
        {"input": ["a", ""]},
        {"input": [1, 2]},
        {"input": [[1], [2, 3]]},
        {"input": "a", "dimensions": None, "model": None, "encoding_format": None},
        {"input": "a", "encoding_format": "bytes", "embed_dtype": "fp8_e4m3", "unknown": [{}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [[{"role": "user", "content": [{"type": "text", "text": "a"}]}]]},
    ],
)
def test_good_bodies_fit(body: dict[str, Any]) -> None:
    validator(document(Settings()), "EmbeddingRequest").validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "m"},
        {"input": []},
        {"input": [1, "a"]},
        {"input": [[[1]]]},
        {"input": [-1]},
        {"input": "a", "dimensions": "many"},
        {"input": "a", "truncate_prompt_tokens": -2},
        {"input": "a", "encoding_format": "hex"},
    ],
)
def test_bad_bodies_do_not_fit(body: dict[str, Any]) -> None:
    assert not validator(document(Settings()), "EmbeddingRequest").is_valid(body)


def test_examples_fit_their_schemas() -> None:
    described = document(Settings())
    count = 0
    for item in described["paths"].values():
        for operation in item.values():
            for content in operation.get("requestBody", {"content": {}})["content"].values():
                for example in content["examples"].values():
                    validator(described, content["schema"]["$ref"].rpartition("/")[2]).validate(example["value"])
                    count += 1
            for content in operation["responses"]["200"]["content"].values():
                if "example" in content:
                    validator(described, content["schema"]["$ref"].rpartition("/")[2]).validate(content["example"])
                    count += 1
    assert count >= 15


def test_all_references_lead_somewhere() -> None:
    described = document(Settings(api_key=("k",)))

    def walk(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            if "$ref" in value:
                place: Any = described
                for name in value["$ref"].removeprefix("#/").split("/"):
                    place = place[name]
            for item in value.values():
                walk(item)

    walk(described)


def test_keys_are_told_where_they_are_needed() -> None:
    paths = document(Settings(api_key=("k",), metrics_open=True))["paths"]
    locked = {path for path, item in paths.items() if all("security" in operation for operation in item.values())}
    assert locked == paths.keys() - {"/health", "/livez", "/ready", "/ping", "/version", "/metrics"}
    assert all("401" in operation["responses"] for path in locked for operation in paths[path].values())
    assert "security" not in document(Settings())["paths"]["/v1/embeddings"]["post"]


async def test_the_page_shows_all_and_loads_nothing(client: httpx2.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    described = document(Settings())
    for item in described["paths"].values():
        for operation in item.values():
            assert f'id="{operation["operationId"]}"' in response.text
    for name in EmbeddingRequest.model_fields:
        assert f"<code>{name}</code>" in response.text
    assert not re.search(
        r"<(?:script|link|img|iframe)\b|@import|url\(|(?:src|href)=[\"']?(?:https?:)?//", response.text
    )


async def test_the_lines_of_the_page_can_be_run(client: httpx2.AsyncClient) -> None:
    shown = unescape((await client.get("/docs", headers={"host": "api.example:81"})).text)
    assert "URL=http://api.example:81</code>" in shown
    assert "<b>" not in (await client.get("/docs", headers={"host": "<b>api.example:81"})).text
    lines = re.findall(r"curl .*?(?=</code>)", shown)
    assert len(lines) == 8
    for line in lines:
        assert line.startswith('curl "$URL/')
        assert line.endswith(" -o vectors.bin") == ("bytes" in line)
    assert "KEY=" not in shown
    assert "<code>URL=x\nKEY=your-key</code>" in page(document(Settings(api_key=("k",))), "x")


def test_the_page_tells_the_headers_of_errors() -> None:
    shown = page(document(Settings()), "x")
    (row,) = re.findall(r"<tr><td><code>429</code></td><td>.*?</tr>", shown)
    assert "<code>Retry-After</code>" in row
    assert "<code>x-should-retry</code>" in row
    assert re.search(r"<td><code>Retry-After</code></td><td>Seconds to wait", shown)


def test_the_page_is_well_formed_and_escaped() -> None:
    described = document(Settings())
    described["info"]["title"] = "<b>&"
    shown = page(described, "<b>")
    assert "<b>" not in shown
    assert "&lt;b&gt;&amp;" in shown
    for tag in ("section", "table", "tr", "td", "code", "pre", "nav", "ul", "li", "p"):
        assert len(re.findall(rf"<{tag}[ >]", shown)) == shown.count(f"</{tag}>"), tag
