from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import engine_report as report
import pytest
from engine import choices
from engine_figures import Setting
from engine_process import Process
from engine_sides import Choice


def sides(*of: tuple[Choice, dict[str, Any]]) -> dict[str, Process]:
    """As the rounds know them, without processes."""
    known = ((choice.name, SimpleNamespace(choice=choice, description=description)) for choice, description in of)
    return cast("dict[str, Process]", dict(known))


@pytest.fixture
def on_avx2() -> dict[str, Process]:
    """A machine without instructions for bfloat16, where OpenVINO computes in another format than it was asked for."""
    return sides(
        (Choice("sentence-transformers", "bfloat16"), {"dtype": "bfloat16"}),
        (Choice("openvino", "bfloat16"), {"dtype": "float32"}),
        (Choice("openvino", "float32"), {"dtype": "float32"}),
        (Choice("ours", "auto"), {"dtype": "float32", "why": "CPU without AMX", "encoder": "packed"}),
    )


def test_formats_that_the_cpu_lacks_are_told(on_avx2: dict[str, Process]) -> None:
    notes = [*report.notes_on_formats(on_avx2, bfloat16=False)]
    assert notes == [
        "`sentence-transformers bfloat16` emulates bfloat16: the CPU has no instructions for it.",
        "`openvino bfloat16` computes in float32 all the same: the CPU has no instructions for bfloat16.",
        "`ours auto` computes in float32: CPU without AMX; encoder: packed.",
    ]
    assert report.natural(on_avx2, bfloat16=False) == ["openvino float32", "ours auto"]
    assert [*report.labels(on_avx2, bfloat16=False).values()] == [
        "sentence-transformers bfloat16 (emulated)",
        "openvino bfloat16 (in float32)",
        "openvino float32",
        "ours auto (in float32)",
    ]


def test_with_instructions_for_bfloat16_all_formats_count() -> None:
    known = sides(
        (Choice("sentence-transformers", "bfloat16"), {"dtype": "bfloat16"}),
        (Choice("ours", "auto"), {"dtype": "bfloat16", "why": "CPU with AMX", "encoder": "bert"}),
    )
    assert [*report.notes_on_formats(known, bfloat16=True)] == [
        "`ours auto` computes in bfloat16: CPU with AMX; encoder: bert."
    ]
    assert report.natural(known, bfloat16=True) == [*known]
    assert report.labels(known, bfloat16=True)["ours auto"] == "ours auto (in bfloat16)"


def test_the_throughput_table_names_batches_ratios_and_nearness() -> None:
    samples = {"other": [100.0, 50.0, 100.0], "ours": [200.0, 150.0, 200.0]}
    settings = {"other": Setting("latency", 1024, 1.0), "ours": Setting("", 2048, 1.0)}
    lines = [*report.throughput(samples, settings, {"other": (3, 1.0), "ours": (0, float("nan"))}, "ours")]
    assert lines[2] == "| other | 1,024 (latency) | 100 (50–100) | 2.00 (2.00–3.00) | 1.000000 (3) |"  # noqa: RUF001
    assert lines[3] == "| ours | 2,048 | 200 (150–200) | 1.00 (1.00–1.00) | – |"  # noqa: RUF001


def test_the_latency_table_is_in_milliseconds_and_compares_medians() -> None:
    lines = [*report.latency({"other": [[0.010, 0.020, 0.030]], "ours": [[0.005, 0.010, 0.015]]}, "ours")]
    assert lines[2] == "| other | 20.00 | 28.00 | 0.50 (0.50–0.50) |"  # noqa: RUF001
    assert lines[3].startswith("| ours | 10.00 | 14.00 | 1.00")


def test_the_table_by_length_compares_each_side_with_ours() -> None:
    samples = {16: {"other": [10.0], "ours": [30.0]}, 64: {"other": [20.0], "ours": [30.0]}}
    lines = [*report.by_length(samples, "ours")]
    assert lines[0] == "| side | 16 tokens | 64 tokens |"
    assert lines[2:] == ["| other | 10 (3.00) | 20 (1.50) |", "| ours | 30 | 30 |"]


def test_all_sides_are_there_unless_some_are_chosen() -> None:
    names = [choice.name for choice in choices(["padded"], [])]
    assert names[:4] == [
        f"{library} {dtype}" for library in ("sentence-transformers", "openvino") for dtype in ("float32", "bfloat16")
    ]
    assert "ours auto" in names
    assert names[-1] == "ours auto padded"
    chosen = [choice.name for choice in choices([], ["openvino"])]
    assert "sentence-transformers float32" in chosen  # the exact vectors are always needed
    assert "sentence-transformers bfloat16" not in chosen
