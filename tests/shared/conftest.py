"""What the tests of `shared/` have in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from .made_files import Make, write_files


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a model's JSON files: `make(modules=("Transformer", "Pooling"))`."""
    return partial(write_files, tmp_path)
