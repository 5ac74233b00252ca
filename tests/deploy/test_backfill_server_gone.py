"""A backfill that has joined the server of this machine, which then ends: nobody ever comes back to that queue."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from embedstream.shared import runfile
from embedstream.shared.processes import identity_of


def test_it_ends_and_says_how_to_go_on(tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("a\nb\n")
    with subprocess.Popen(["sleep", "600"]) as server:
        owner = identity_of(server.pid)
        assert owner is not None
        url = f"unix://{runfile.create_private_folder(owner)}/{runfile.SOCKET_NAME}"
        command = [sys.executable, "-m", "embedstream.deploy", "backfill", str(rows), str(tmp_path / "out")]
        with subprocess.Popen(
            [*command, "--redis-url", url, "--model", "m"], stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                assert process.stderr is not None
                while "waiting: " not in (line := process.stderr.readline()):
                    assert line, "it ended before"
                time.sleep(1.0)
                assert process.poll() is None  # while the server may still answer it is patient
                server.kill()
                server.wait()
                _, said = process.communicate(timeout=60)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
    assert process.returncode == 69, said
    assert "has ended, and its queue with it" in said.splitlines()[-1]
