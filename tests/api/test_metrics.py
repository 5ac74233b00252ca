from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import structlog
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.shared.settings import Settings

URL = "/metrics"
Connect = Callable[[Starlette], httpx2.AsyncClient]


def count(path: str, status: int) -> float:
    labels = {"path": path, "status": str(status)}
    return REGISTRY.get_sample_value("embedstream_http_requests_total", labels) or 0.0


async def test_prometheus_text_by_default(client: httpx2.AsyncClient) -> None:
    response = await client.get(URL)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# TYPE embedstream_requests_total counter\n" in response.text


async def test_openmetrics_for_those_who_ask(client: httpx2.AsyncClient) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    response = await client.get(URL, headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=x", "text/plain;version=\xb2", "*/*", ";"])
async def test_any_other_wish_gets_the_plain_text(client: httpx2.AsyncClient, accept: str) -> None:
    response = await client.get(URL, headers={b"accept": accept.encode("latin-1")})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(
    ("path", "template", "status"),
    [
        ("/livez", "/livez", 200),
        ("/v1/models/tiny", "/v1/models/{name}", 200),
        ("/v1/models/owner/tiny", "/v1/models/{name}", 200),
        ("/v1/models/unknown", "/v1/models/{name}", 404),
        ("/v1/embeddings", "/v1/embeddings", 405),
        ("/wp-login.php", "other", 404),
        ("/v1/embeddings/", "other", 404),
        ("/metrics", "/metrics", 200),
    ],
)
async def test_requests_are_counted_by_route(client: httpx2.AsyncClient, path: str, template: str, status: int) -> None:
    before = count(template, status)
    timed = REGISTRY.get_sample_value("embedstream_http_seconds_count", {"path": template}) or 0.0
    assert (await client.get(path)).status_code == status
    assert count(template, status) == before + 1
    assert REGISTRY.get_sample_value("embedstream_http_seconds_count", {"path": template}) == timed + 1


async def test_a_refused_request_counts_for_its_route(producer: StubProducer, connect_to: Connect) -> None:
    before = count("/v1/embeddings", 401)
    async with connect_to(create_app(Settings(api_key=("key",)), producer)) as client:
        await client.post("/v1/embeddings", json={"input": "a"})
    assert count("/v1/embeddings", 401) == before + 1


@pytest.mark.parametrize(("is_open", "status"), [(False, 401), (True, 200)])
async def test_metrics_need_a_key_unless_they_are_open(
    producer: StubProducer, connect_to: Connect, is_open: bool, status: int
) -> None:
    async with connect_to(create_app(Settings(api_key=("key",), metrics_open=is_open), producer)) as client:
        assert (await client.get(URL)).status_code == status
        assert (await client.get(URL, headers={"authorization": "Bearer key"})).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_scrapes_are_logged_at_debug(client: httpx2.AsyncClient) -> None:
    with structlog.testing.capture_logs() as logs:
        await client.get(URL)
    assert [entry["log_level"] for entry in logs] == ["debug"]


def test_in_a_shared_folder_it_shows_the_sum(tmp_path: Path) -> None:
    code = (
        "import asyncio, httpx2; from embedstream.api import create_app; from embedstream.producer import Producer;"
        "from embedstream.shared.settings import Settings; from embedstream.shared import metrics;"
        "metrics.JOBS.labels('bulk', 'ok').inc(3);"
        "app = create_app(Settings(), Producer('redis://localhost:1'));"
        "client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url='http://x');"
        "print(asyncio.run(client.get('/metrics')).text)"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for expected in ("3.0", "6.0"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert f'embedstream_jobs_total{{lane="bulk",status="ok"}} {expected}\n' in done.stdout
        assert "python_info" not in done.stdout  # of whichever process is asked, so of no use
