"""Tests that need a CUDA device: `make test-gpu`. Without one each is skipped and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} finds no CUDA device here"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)
