from __future__ import annotations

from pathlib import Path

import machine
import pytest


@pytest.mark.parametrize(
    ("line", "expected", "fast"),
    [
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile", ["amx_bf16", "amx_tile", "avx512f", "avx2"], True),
        ("flags\t\t: fpu avx2 avx512f", ["avx512f", "avx2"], False),  # AVX512 alone has no bfloat16
        ("Features\t: fp asimd bf16", ["bf16", "asimd"], True),
        ("model name\t: of another kind", [], False),
    ],
    ids=["amx", "avx512", "arm", "unknown"],
)
def test_instructions_are_read_as_the_kernel_tells_them(
    line: str, expected: list[str], fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_features() == expected
    assert machine.has_bfloat16(expected) is fast


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC", "AMD EPYC of family 26, model 2"),
        ("model name\t: Neoverse", "Neoverse"),
    ],
)
def test_a_cpu_is_named_with_its_kind(
    lines: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{lines}\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == expected


def test_packages_that_are_not_there_are_not_named() -> None:
    assert machine.versions(["no-such-package", "numpy"]).startswith("numpy ")
