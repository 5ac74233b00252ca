from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import structlog
from starlette.applications import Starlette
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.api.context import Caller
from embedstream.api.keys import OPEN_PATHS, KeyRing
from embedstream.shared.settings import Settings

URL = "/v1/embeddings"
Connect = Callable[[Starlette], httpx2.AsyncClient]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def guarded(producer: StubProducer, connect_to: Connect) -> AsyncIterator[httpx2.AsyncClient]:
    async with connect_to(create_app(Settings(api_key=("first", "second ü")), producer)) as client:
        yield client


@pytest.mark.parametrize("header", ["Bearer first", "bearer first", "BEARER  first ", "Bearer second ü"])
async def test_each_key_opens(guarded: httpx2.AsyncClient, header: str) -> None:
    assert (await guarded.get("/v1/models", headers={b"authorization": header.encode()})).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer firs", "Bearer firstt", "Basic first", "first", "Bearer first x"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/metrics", "/health/", "/v1/health", "//health"])
async def test_anything_else_is_401(guarded: httpx2.AsyncClient, header: str | None, path: str) -> None:
    response = await guarded.get(path, headers={} if header is None else {"authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, 401)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_open_paths_need_no_key(guarded: httpx2.AsyncClient, path: str) -> None:
    assert (await guarded.get(path)).status_code == 200


async def test_only_a_preflight_passes_without_a_key(guarded: httpx2.AsyncClient) -> None:
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    assert (await guarded.options(URL, headers=preflight)).status_code == 405
    assert (await guarded.options(URL)).status_code == 401
    assert (await guarded.get("/v1/models", headers=preflight)).status_code == 401


async def test_a_request_without_a_key_is_not_read(guarded: httpx2.AsyncClient, producer: StubProducer) -> None:
    assert (await guarded.post(URL, content=b"not even JSON")).status_code == 401
    assert producer.tokenised == []


async def test_without_keys_all_is_open(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/models", headers={"authorization": "Bearer whatever"})).status_code == 200


def test_keys_are_kept_as_digests_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[keys.a]\nkey = "psst-psst"\n')
    ring = KeyRing(["hush-hush"], path)
    assert ring.caller_of(b"hush-hush") == Caller("api-key-1")
    assert ring.caller_of(b"psst-psst") == Caller("a")
    shown = repr({name: getattr(ring, name) for name in vars(ring)})
    assert "hush-hush" not in shown
    assert "psst-psst" not in shown


def test_an_empty_key_is_none() -> None:
    assert KeyRing([""]).caller_of(b"") is None


async def test_the_name_of_the_key_is_logged(guarded: httpx2.AsyncClient) -> None:
    with structlog.testing.capture_logs() as logs:
        for key in ("first", "second ü", "third"):
            await guarded.get("/v1/models", headers={b"authorization": f"Bearer {key}".encode()})
        await guarded.get("/livez", headers=bearer("first"))
    assert [line.get("key") for line in logs] == ["api-key-1", "api-key-2", None, None]
