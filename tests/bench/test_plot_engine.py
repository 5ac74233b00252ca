from __future__ import annotations

from pathlib import Path

from plot_engine import plot

PNG = b"\x89PNG"


def test_the_picture_shows_all_sides(tmp_path: Path) -> None:
    throughput = {"ours auto": [5000.0, 5100.0], "openvino float32": [4800.0, 4700.0], "ours bfloat16": [300.0, 310.0]}
    latency = {name: [[0.01, 0.02], [0.01, 0.03]] for name in throughput}
    plot(tmp_path / "engine.png", throughput, latency, "a model on a machine")
    assert (tmp_path / "engine.png").read_bytes().startswith(PNG)
