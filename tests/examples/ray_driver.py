"""Runs examples/ray_data.py on a small cluster of its own: python ray_driver.py IN OUT REDIS_URL."""

from __future__ import annotations

import runpy
from pathlib import Path

import ray

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray_data.py"

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=100 * 1024 * 1024)
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        ray.shutdown()
