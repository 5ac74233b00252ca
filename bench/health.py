"""How long GET /health takes while an API process has all it can do: `.venv/bin/python bench/health.py`.

Starts a Valkey, a consumer that answers at once and one API process; then 32 clients ask for ever, each for one of the
kinds of large requests, while probes are timed, half of them on new connections. The consumer and the clients stand for
other machines and run at the lowest priority. With `--port` it takes a server that runs already, its model being the
only thing that must fit the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hostile.deployment import Deployment
from tests.hostile.load import bodies, probe

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.shared.settings import Settings

_SETTLE_S = 2.0


def measure(port: int, kind: str, clients: int, probes: int) -> list[float]:
    """Seconds that probes took, sorted, while so many clients ask for one kind; `idle` for none."""
    if kind == "idle":
        return asyncio.run(probe(port, probes))
    argv = ["nice", "-n", "19", sys.executable, "-m", "tests.hostile.load"]
    argv += ["--port", str(port), "--kind", kind, "--clients", str(clients)]
    load = subprocess.Popen(argv, cwd=sys.path[0])
    try:
        time.sleep(_SETTLE_S)
        taken_s = asyncio.run(probe(port, probes))
        if load.poll() is not None:
            raise SystemExit(f"the clients of kind {kind} ended: the server does not answer them")
        return taken_s
    finally:
        load.kill()
        load.wait()


def table(port: int, clients: int, probes: int) -> None:
    """Measure each kind, and print its row."""
    print(f"{probes} probes beside {clients} clients, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print("| requests | p50 ms | p90 ms | p99 ms | max ms |\n| --- | --- | --- | --- | --- |")
    for kind in ("idle", *bodies(), "all"):
        taken_s = measure(port, kind, clients, probes)
        shown = [taken_s[int(len(taken_s) * share)] for share in (0.5, 0.9, 0.99)] + [taken_s[-1]]
        print(f"| {kind} | " + " | ".join(f"{seconds * 1000:.1f}" for seconds in shown) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="of a server that runs already on this machine")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--probes", type=int, default=1000)
    options = parser.parse_args()
    if options.port is not None:
        table(options.port, options.clients, options.probes)
        return
    with (
        EmbeddedServer(Settings()) as server,
        tempfile.TemporaryDirectory() as folder,
        Deployment(Path(folder), {"REDIS_URL": server.url, "KEY_PREFIX": "bench", "MAX_WAIT_S": 1000}) as here,
    ):
        here.start("consumer", "tests.hostile.wide_consumer", "--name", "c", "--revision", "r1", elsewhere=True)
        here.start_api()
        table(here.port, options.clients, options.probes)


if __name__ == "__main__":
    main()
