from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from pydantic import ValidationError
from starlette.applications import Starlette
from tests.api.conftest import StubProducer

import embedstream.api
from embedstream.api import create_app
from embedstream.api.cors import EXPOSED_HEADERS
from embedstream.shared.settings import Settings

URL = "/v1/embeddings"
PAGE, OTHER = "https://app.example", "https://evil.example"
Connect = Callable[[Starlette], httpx2.AsyncClient]


@pytest.fixture
async def browser(producer: StubProducer, connect_to: Connect) -> AsyncIterator[httpx2.AsyncClient]:
    settings = Settings(api_key=("right",), cors_allow_origin=(PAGE, "http://localhost:3000"), payload_limit=1024)
    async with connect_to(create_app(settings, producer)) as client:
        yield client


def preflight(origin: str, method: str = "POST", headers: str = "authorization, content-type") -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": headers,
    }


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
@pytest.mark.parametrize("path", [URL, "/v1/models", "/health"])
async def test_a_preflight_of_an_allowed_page_needs_no_key(browser: httpx2.AsyncClient, origin: str, path: str) -> None:
    wanted = "authorization,content-type,x-stainless-os,x-lane"
    response = await browser.options(path, headers=preflight(origin, headers=wanted))
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert response.headers["access-control-allow-headers"] == wanted
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "Origin" in response.headers["vary"]
    assert "access-control-allow-credentials" not in response.headers
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("origin", "method", "what"),
    [
        (OTHER, "POST", "origin"),
        ("https://app.example.evil.example", "POST", "origin"),
        ("http://app.example", "POST", "origin"),
        ("null", "POST", "origin"),
        (PAGE, "DELETE", "method"),
        (OTHER, "DELETE", "origin, method"),
    ],
)
async def test_any_other_preflight_is_refused_in_our_form(
    browser: httpx2.AsyncClient, origin: str, method: str, what: str
) -> None:
    response = await browser.options(URL, headers=preflight(origin, method))
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert ("access-control-allow-origin" in response.headers) == (origin == PAGE)
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert error["message"].endswith(f": its {what}.")


async def test_a_page_can_read_every_answer_errors_too(browser: httpx2.AsyncClient) -> None:
    key = {"authorization": "Bearer right"}
    requests: list[tuple[dict[str, Any], int]] = [
        ({"json": {"input": "a"}, "headers": key}, 200),
        ({"json": {"input": []}, "headers": key}, 400),
        ({"json": {"input": "a"}}, 401),
        ({"json": {"input": "a", "model": "x"}, "headers": key}, 404),
        ({"json": {"input": "a" * 1024}, "headers": key}, 413),
        ({"content": b"x", "headers": key | {"content-encoding": "br"}}, 415),
    ]
    for request, status in requests:
        request["headers"] = {"origin": PAGE, **request.get("headers", {})}
        with structlog.testing.capture_logs() as logs:
            response = await browser.post(URL, **request)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["vary"] == "Origin"
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert response.headers["x-request-id"]
        assert [line["status"] for line in logs if line["event"] == "http.request"] == [status]


async def test_other_pages_get_an_answer_that_their_browser_hides(browser: httpx2.AsyncClient) -> None:
    response = await browser.get("/livez", headers={"origin": OTHER})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


async def test_a_star_allows_all_pages(producer: StubProducer, connect_to: Connect) -> None:
    async with connect_to(create_app(Settings(cors_allow_origin=("*",)), producer)) as client:
        assert (await client.options(URL, headers=preflight(OTHER))).headers["access-control-allow-origin"] == "*"
        response = await client.post(URL, json={"input": "a"}, headers={"origin": OTHER})
        assert response.headers["access-control-allow-origin"] == "*"


async def test_by_itself_no_page_is_allowed(client: httpx2.AsyncClient) -> None:
    assert (await client.options(URL, headers=preflight(PAGE))).status_code == 405
    response = await client.post(URL, json={"input": "a"}, headers={"origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_every_header_we_set_can_be_read() -> None:
    (folder,) = {Path(path) for path in embedstream.api.__path__}
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "deadline.py")
    ours = set(re.findall(r'"((?:x-[a-z-]+|metadata|retry-after))"', code.lower()))
    asked = {"x-metadata", "x-lane", "x-on-error", "x-gzip", "x-request-timeout-ms"}  # in requests
    assert ours - asked == set(EXPOSED_HEADERS) - {"allow"}


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "HTTPS://app.example", "https://a b", "null"]
)
def test_what_no_browser_would_send_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="neither `\\*` nor a scheme and host"):
        Settings(cors_allow_origin=(origin,))


@pytest.mark.parametrize("origin", ["https://app.example:8443", "chrome-extension://abc", "capacitor://localhost"])
def test_what_browsers_and_shells_of_apps_send_is_one(origin: str) -> None:
    assert Settings(cors_allow_origin=(origin,)).cors_allow_origin == (origin,)


def test_the_environment_takes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CORS_ALLOW_ORIGIN", "https://a.example, https://b.example")
    assert Settings().cors_allow_origin == ("https://a.example", "https://b.example")
