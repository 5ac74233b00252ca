"""Folders of its own for each test: no test may meet a server of the person who runs it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short folder (socket paths are limited) that stands for the session's and the temporary folder."""
    tmp_path_factory.getbasetemp()  # pytest makes its own folder at first use, and must not make it below ours
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        folder = Path(name)
        for variable, part in (("XDG_RUNTIME_DIR", "run"), ("TMPDIR", "tmp")):
            (folder / part).mkdir(mode=0o700)
            monkeypatch.setenv(variable, str(folder / part))
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        for variable in [name for name in os.environ if name.upper().startswith("EMBEDSTREAM_")]:
            monkeypatch.delenv(variable)
        yield folder
