"""The process: its socket, its signals and its exit code. Redis is away, which only the requests notice."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import structlog

from embedstream.api import main
from embedstream.shared.settings import Settings

_PROGRAM = """
import sys
from embedstream.api.main import run
from embedstream.shared.settings import Settings
sys.exit(run(Settings(redis_url=f"unix://{sys.argv[1]}/nothing.sock"), fd=int(sys.argv[2])))
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serves_on_an_inherited_socket_until_it_is_told_to_stop(tmp_path: Path, stop: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tmp_path), str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx2.Client(trust_env=False, timeout=60) as client:  # the connection waits until the server is up
            assert client.get(f"{url}/livez").status_code == 200
            response = client.get(f"{url}/health")
            assert (response.status_code, response.json()["error"]["message"]) == (503, "Redis cannot be reached.")
            assert "server" not in response.headers
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()  # closes the pipe too, when it did not come so far above
    assert process.returncode == 0
    assert "api.listening" in errors
    assert "api.stopped" in errors
    assert "Traceback" not in errors


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(redis_url=f"unix://{tmp_path}/nothing.sock", port=port)
        assert main.run(settings) == 69
    assert capsys.readouterr().err == f"embedstream: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_files_are_allowed_as_far_as_the_hard_limit_lets_us(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    main._allow_files(1000)
    assert limits == [(1024, 4096)]
    main._allow_files(2000)
    assert limits[-1] == (2000, 4096)
    with structlog.testing.capture_logs() as lines:
        main._allow_files(5000)
    assert limits[-1] == (4096, 4096)
    (line,) = lines
    assert (line["event"], line["allowed"], line["wanted"]) == ("api.few_files", 4096, 5000)


def test_the_kernel_looks_after_accepted_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        main._notice_dead_peers(listener, Settings(keep_alive_timeout_s=40, write_timeout_s=7.5))
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if sys.platform == "linux":
                names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                numbers = [getattr(socket, name) for name in names]
                options = [accepted.getsockopt(socket.IPPROTO_TCP, number) for number in numbers]
                assert options == [40, 10, 4, 7500]
    with socket.socket(socket.AF_UNIX) as other:
        main._notice_dead_peers(other, Settings())  # nothing to ask of the kernel there
