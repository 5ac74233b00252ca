"""The example with Ray Data, on a real cluster of one node, against a real queue."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.producer import SyncProducer
from embedstream.shared.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("ray_driver.py")
TEXTS = [f"passage number {number}: " + "word " * (number % 50) for number in range(9_000)]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's own files, on a short path: sockets lie in it. Whatever process of Ray still runs there is ended."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    try:
        yield folder
    finally:
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(folder).encode() in command.read_bytes():
                    os.kill(int(command.parent.name), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, *command], env=os.environ | environment, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_every_row_gets_its_vector(settings: Settings, ray_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for part in range(3):
        rows = range(part, len(TEXTS), 3)
        table = pa.table({"id": list(rows), "text": [TEXTS[row] for row in rows]})
        pq.write_table(table, tmp_path / "in" / f"{part}.parquet")
    assert settings.redis_url is not None
    queue = {"EMBEDSTREAM_REDIS_URL": settings.redis_url, "EMBEDSTREAM_KEY_PREFIX": settings.key_prefix}
    folders = (str(tmp_path / "in"), str(tmp_path / "out"))
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(ray_folder), "PYTHONWARNINGS": "ignore"}
    with (
        running("bench/null_consumer.py", **queue),
        running(str(DRIVER), *folders, settings.redis_url, **queue, **ray) as driver,
    ):
        assert driver.wait(400) == 0
        with SyncProducer(settings=settings) as producer:
            expected = producer.embed(TEXTS, lane="bulk")
    found = pq.read_table(tmp_path / "out").sort_by("id")
    assert found["id"].to_pylist() == list(range(len(TEXTS)))
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    np.testing.assert_array_equal(np.stack(found["embedding"].to_numpy()), expected)
