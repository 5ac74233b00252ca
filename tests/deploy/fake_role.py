"""Stands for the API and the consumer in tests of the supervisor: no HTTP stack, no model.

`fake_role.py api --fd N` answers /health with 200; `fake_role.py consumer` waits. What goes wrong is said by FAKE_*
variables; each process leaves a file `<role>.<pid>` in FAKE_DIR, with what it was given.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

_KEPT = ("CUDA_", "EMBEDSTREAM_", "OMP_", "PROMETHEUS_")


def main() -> None:
    role = sys.argv[1]
    folder = Path(os.environ["FAKE_DIR"])
    signal.alarm(300)  # even a test that fails leaves none of these behind for long
    if role in os.environ.get("FAKE_STUBBORN", ""):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: note_end(folder, role))
    given = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
    # What the metrics library would leave: a live gauge.
    gauge = f"gauge_livesum_{os.environ['PROMETHEUS_MULTIPROC_PROCESS']}.db"
    (Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]) / gauge).touch()
    draft = folder / f".{os.getpid()}"
    draft.write_text(json.dumps(given))
    draft.rename(folder / f"{role}.{os.getpid()}")
    spared = os.environ["PROMETHEUS_MULTIPROC_PROCESS"] == os.environ.get("FAKE_SPARED")
    if role in os.environ.get("FAKE_FINAL", "") and not spared:
        sys.stderr.write(f"the {role} has its reason\n")
        sys.exit(78)
    if role == "api":
        answer(int(sys.argv[sys.argv.index("--fd") + 1]), folder)
    while True:
        time.sleep(60)


def note_end(folder: Path, role: str) -> None:
    with (folder / "ends").open("a") as file:
        file.write(f"{role}\n")
    sys.exit(0)


def answer(fd: int, folder: Path) -> None:
    with socket.socket(fileno=fd) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(65536)
                if b" /livez " not in request and (folder / "loading").exists():
                    body = b'{"error": {"message": "no consumer is alive"}}'
                    connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


if __name__ == "__main__":
    main()
