"""Probes are answered while the process is as busy as it can be."""

from __future__ import annotations

import pytest

from .deployment import Deployment
from .load import probe
from .yardstick import slowness

PROBES = 300
ROUNDS = 3
"""The best of them counts: in the others something else may have had the processor."""
MOST_S = 0.5
"""The promise is 50 ms at the 99th percentile (`bench/health.py`); tests run on machines that do other work too."""


async def test_health_under_full_load(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("health")
    with Deployment(folder, {"REDIS_URL": redis_url, "KEY_PREFIX": "health", "MAX_WAIT_S": 1000}) as here:
        here.start("consumer", "tests.hostile.wide_consumer", "--name", "c1", "--revision", "r1", elsewhere=True)
        api = here.start_api()
        load = here.start("load", "tests.hostile.load", "--port", str(here.port), elsewhere=True)
        await probe(here.port, 20)  # until all clients are at it
        for _ in range(ROUNDS):
            taken_s = await probe(here.port, PROBES)
            p50_s, p99_s = taken_s[PROBES // 2], taken_s[PROBES * 99 // 100]
            print(f"p50 {p50_s * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms, max {taken_s[-1] * 1000:.1f} ms")  # noqa: T201
            most_s = MOST_S * slowness()
            if p99_s <= most_s:
                break
        assert load.code is None, load.log_tail()
        assert api.code is None
        assert p99_s <= most_s
