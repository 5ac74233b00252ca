"""A backfill is killed before every act of it, one after the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .crash_points import in_a_process

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("out", ["out", "out.parquet", "out.jsonl.gz"])
async def test_25_killed_at_every_act(tmp_path: Path, seed: int, out: str) -> None:
    """Killed before each act upon files, from the first to the last, and resumed."""
    code, said = await in_a_process(tmp_path, seed, out)
    assert code == os.EX_OK, said


async def test_26_killed_on_the_way_to_a_database(tmp_path: Path, seed: int) -> None:
    """Killed before some of these acts while it writes to PostgreSQL, and resumed."""
    code, said = await in_a_process(tmp_path, seed, "pgvector", most=15)
    assert code == os.EX_OK, said
