from __future__ import annotations

import pytest

from embedstream.shared.urls import without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user@host:6379", "redis://user@host:6379"),
        ("redis://:pw@host", "redis://:***@host"),
        ("rediss://user:p@/w:x@host:1/0", "rediss://user:***@host:1/0"),
        ("unix:///run/a:b@c/v.sock", "unix:///run/a:b@c/v.sock"),
        ("unix:///v.sock?db=1&password=pw&x=1", "unix:///v.sock?db=1&password=***&x=1"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert without_password(url) == shown
