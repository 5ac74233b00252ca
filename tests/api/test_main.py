"""The process: its socket, its signals and its exit code. Redis is away, which only the requests notice."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

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
        process.wait()
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
