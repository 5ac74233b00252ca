"""Real servers for real clients: everything here talks HTTP, nothing imports embedstream.

The servers run from the project's own environment, `.venv`, with the real all-MiniLM-L6-v2 in float32 and a Valkey of
their own. The clients run in `.venv-clients`, and reach nothing but this machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.clients.callers import CALLERS
from tests.clients.deployment import Deployment
from tests.clients.servers import MODEL, Server

HERE = frozenset({"127.0.0.1", "::1", "localhost"})


@pytest.fixture(scope="session", autouse=True)
def _this_machine_only() -> Iterator[None]:
    """A client that reaches out fails its test, instead of passing only where there is a network."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in HERE:
            raise AssertionError(f"a client connects to {address[0]}")
        connect(self, address)

    def look_up_here(host: Any, *arguments: Any, **options: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host) not in {*HERE, None}:
            raise AssertionError(f"a client looks up {host}")
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setattr(socket, "getaddrinfo", look_up_here)
        yield


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> Iterator[Path]:
    """OpenAI's cl100k_base, which LiteLLM brings along; tiktoken then has no need to download it."""
    import litellm

    path = Path(litellm.__file__).parent / "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(path.parent))
        yield path


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """An API, a consumer with the real model in float32, a Valkey, and what tests add to them."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("EMBEDSTREAM_")}
    for variable in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        folder = tmp_path_factory.mktemp(variable[4:7].lower())
        folder.chmod(0o700)
        environment[variable] = str(folder)
    with Deployment(environment | {"HF_HUB_OFFLINE": "1"}, tmp_path_factory) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def server(deployment: Deployment) -> Server:
    """As it is by default, but for a key; any Matryoshka size may be asked for."""
    return deployment.server


@pytest.fixture(scope="session")
def cl100k_server(deployment: Deployment, vocabulary: Path) -> Server:
    """Reads token ids as cl100k_base, and long inputs piece by piece."""
    options = ("--token-ids", "cl100k", "--cl100k-vocabulary", str(vocabulary), "--long-inputs", "chunk")
    return deployment.api(*options)


@pytest.fixture(scope="session")
def limited_server(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Here the key `limited-NAME` of each client may spend 20 tokens a second, and has 20 in hand."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    entry = '[keys.{0}]\nkey = "limited-{0}"\ntokens_per_s = 20\nburst_tokens = 20\n'
    path.write_text("\n".join(entry.format(caller.name) for caller in CALLERS))
    return deployment.api("--api-keys-file", str(path))


@pytest.fixture(scope="session")
def lonely_server(deployment: Deployment) -> Server:
    """On another queue, which no consumer reads: everything is a 503."""
    return deployment.api("--key-prefix", "lonely", "--model", MODEL)


@pytest.fixture(scope="session")
def waiting_server(deployment: Deployment) -> Server:
    """On one more, where it waits for the first consumer in vain."""
    return deployment.api("--key-prefix", "waiting", "--model", MODEL, "--scale-from-zero-s", "60")
