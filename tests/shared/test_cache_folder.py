from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from embedstream.shared.cache_folder import cache_folder
from embedstream.shared.cards import CardCache


def nobody(_uid: int) -> None:
    raise KeyError("uid not found")


def test_it_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("cards") == tmp_path / ".cache" / "embedstream" / "cards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache_folder("cards") == tmp_path / "elsewhere" / "embedstream" / "cards"


def test_a_user_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a container's that is started with any number for its user."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    assert cache_folder("cards") is None
    cache = CardCache()
    cache.save(b"1234", [b"card"])
    assert cache.load(b"1234", "m") is None
    assert [*tmp_path.iterdir()] == []
