"""What every test may use: a clean environment, and a real Valkey server for those that need Redis."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import hypothesis
import numpy as np
import pytest
import structlog
from numpy.typing import NDArray
from redis.asyncio import Redis
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.shared import logs
from embedstream.shared.keys import Keys
from embedstream.shared.runfile import find_live
from embedstream.shared.settings import PREFIX, Settings

# The machine may be busy: how long an example takes says nothing.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


_TESTS = Path(__file__).parent
_LONGEST_FIRST = (
    "parity/test_matrix.py",
    "deploy/test_own_fleet.py",
    "contract/test_fuzz.py",
    "consumer/test_precision.py",
    "integration/test_vectors.py",
    "consumer/encoders/test_compiled.py",
    "consumer/test_worker.py",
    "examples/test_ray_data.py",
    "contract/test_cases.py",
    "integration/test_backfill_command.py",
    "integration/test_load_failures.py",
    "deploy/test_local.py",
    "hostile/test_turns.py",
    "integration/test_serving.py",
    "producer/backfill/test_backfill.py",
    "producer/test_reconcile.py",
    "examples/test_semantic_search.py",
    "integration/test_streaming.py",
    "hostile/test_health.py",
    "consumer/test_model.py",
    "integration/test_clients.py",
    "consumer/test_capacity.py",
    "hostile/test_bodies.py",
    "consumer/test_takeover.py",
)
"""Files that take more than twenty seconds. A file runs in one process; it is not to run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first."""
    ranks = {_TESTS / name: rank for rank, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test meets the settings, the running servers or the caches of the person who runs it."""
    tmp_path_factory.getbasetemp()  # pytest makes its own folder at first use, and must not make it below ours
    with (
        tempfile.TemporaryDirectory(prefix="es-", ignore_cleanup_errors=True) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        for variable in [variable for variable in os.environ if variable.upper().startswith(PREFIX)]:
            patch.delenv(variable)
        for variable in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
            folder = Path(name) / variable[4:7].lower()
            folder.mkdir(mode=0o700)
            patch.setenv(variable, str(folder))
        temporary = Path(name) / "t"  # run files are looked for there too
        temporary.mkdir(mode=0o700)
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv(f"{PREFIX}MEASURE_MS", "0")  # what consumers do with a budget does not hang on how they found it
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals_as_usual() -> Iterator[None]:
    """Processes that tests start end by a closed terminal and Ctrl-C, also where the tests themselves run under nohup
    or in the background of a script, and were told to ignore them."""
    usual: dict[int, Any] = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.getsignal(number) for number in usual}
    for number, handler in usual.items():
        if before[number] == signal.SIG_IGN:
            signal.signal(number, handler)
    yield
    for number, known in before.items():
        signal.signal(number, known)


@pytest.fixture(scope="session")
def redis_url(_own_folders: None) -> Iterator[str]:
    """A Valkey of the tests' own on a unix socket, shared by all; each test has its own key prefix."""
    with EmbeddedServer(Settings()) as server:
        yield server.url


@asynccontextmanager
async def _full_memory(redis: Redis) -> AsyncIterator[None]:
    usual: Any = await redis.config_get("maxmemory*")
    # Its own limit for clients is a tenth of its memory: it would close the connections of those who ask.
    changed = {"maxmemory-clients": 0, "maxmemory": 1}  # Redis knows the first since version 7
    changed = {name: value for name, value in changed.items() if name in usual}
    for name, value in changed.items():
        await redis.config_set(name, value)
    try:
        yield
    finally:
        for name in reversed(changed):  # a tenth of what is still one byte would close connections again
            await redis.config_set(name, usual[name])


@pytest.fixture
def full_memory() -> Callable[[Redis], AbstractAsyncContextManager[None]]:
    """`async with full_memory(redis):` the server refuses what takes memory, and keeps its connections."""
    return _full_memory


@pytest.fixture
def prefix() -> str:
    """Beginning of this test's Redis keys."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def keys(prefix: str) -> Keys:
    """The keys of a model `m`."""
    return Keys(prefix, "m")


@pytest.fixture
def settings(redis_url: str, prefix: str) -> Settings:
    """Settings of this test's own deployment."""
    return Settings(redis_url=redis_url, key_prefix=prefix)


@pytest.fixture
def same_logging() -> Iterator[None]:
    """For commands that configure logging for their process, which is that of the tests here."""
    before = structlog.get_config()
    loggers = [logging.getLogger(), logging.getLogger(logs.NAME)]
    kept = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    with structlog.contextvars.bound_contextvars(role="test"):
        yield
    structlog.configure(**before)
    for logger, handlers, level, propagate in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@dataclass(frozen=True)
class Serving:
    """A running `embedstream serve` with the real model in float32."""

    url: str
    redis_url: str
    pid: int

    def post(self, body: dict[str, Any], **headers: str) -> httpx2.Response:
        """POST /v1/embeddings."""
        return httpx2.post(f"{self.url}/v1/embeddings", json=body, headers=headers, timeout=120)

    def embed(self, inputs: Any, **options: Any) -> NDArray[np.float32]:
        """Vectors of the inputs, as lists of floats over HTTP."""
        response = self.post({"input": inputs, **options})
        assert response.status_code == 200, response.text
        return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


@pytest.fixture(scope="session")
def serving(_own_folders: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """All in one, as `make run` starts it, on a free port; any Matryoshka size may be asked for."""
    command = [sys.executable, "-m", "embedstream.deploy", "serve", "--port", "0"]
    command += ["--dtype", "float32", "--matryoshka-dims", "any", "--log-level", "warning"]
    command += ["--max-wait-s", "100"]  # a busy machine computes slowly, and admission knows
    log = tmp_path_factory.mktemp("serve") / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert "ready" in ready, log.read_text()
            (server,) = [found for found in find_live() if found.process.pid == process.pid]
            yield Serving(server.http_url, server.redis_url, process.pid)
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def wordpiece_json() -> str:
    """A small BERT tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then letters, digits and two words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "##ing", "queue"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer: Tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token of a text
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()
