from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
import structlog

from embedstream.consumer.metrics_server import metrics_server
from embedstream.shared import metrics
from embedstream.shared.errors import Unavailable
from embedstream.shared.settings import Settings


def test_without_a_port_nobody_listens() -> None:
    before = threading.active_count()
    with metrics_server(Settings()) as port:
        assert port is None
        assert threading.active_count() == before


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_free_port_is_taken_told_and_given_back(host: str) -> None:
    metrics.WATCHDOG_TRIPS.inc()
    with structlog.testing.capture_logs() as logs, metrics_server(Settings(metrics_port=0, metrics_host=host)) as port:
        assert [(entry["event"], entry["url"]) for entry in logs] == [
            ("metrics.listening", f"http://{host}:{port}/metrics")
        ]
        response = httpx2.get(f"http://{host}:{port}/metrics")
        assert response.status_code == 200
        assert "\nembedstream_watchdog_trips_total " in response.text
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://{host}:{port}/metrics")
    with metrics_server(Settings(metrics_port=port, metrics_host=host)) as again:
        assert again == port


def test_a_taken_port_is_named() -> None:
    with metrics_server(Settings(metrics_port=0)) as port:
        again = metrics_server(Settings(metrics_port=port))
        with pytest.raises(Unavailable, match=rf"127\.0\.0\.1:{port} \(--metrics-host, --metrics-port\)"):
            again.__enter__()


def test_an_error_inside_still_closes_it() -> None:
    with pytest.raises(RuntimeError), metrics_server(Settings(metrics_port=0)) as port:
        raise RuntimeError
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/metrics")


def test_in_a_shared_folder_it_shows_the_sum(tmp_path: Path) -> None:
    code = (
        "import httpx2; from embedstream.consumer.metrics_server import metrics_server;"
        "from embedstream.shared.settings import Settings; from embedstream.shared import metrics;"
        "metrics.BATCH_ROWS.observe(3)\n"
        "with metrics_server(Settings(metrics_port=0)) as port:"
        "    print(httpx2.get(f'http://127.0.0.1:{port}/metrics').text)"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for expected in ("1.0", "2.0"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert f"embedstream_batch_rows_count {expected}\n" in done.stdout
