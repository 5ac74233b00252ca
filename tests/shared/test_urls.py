from __future__ import annotations

import pytest

from embedstream.shared.urls import without_password, without_secrets


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no URL: a@b?c", "no URL: a@b?c"),
        (
            "error for url 'https://u:p@host/a/b' (see https://c/d)",
            "error for url 'https://***@host/a/b' (see https://c/d)",
        ),
        ("at: http://token@host:1/x. And http://u:p@q@h/y?z.", "at: http://***@host:1/x. And http://***@h/y?***"),
        ("https://cdn/x?X-Sig=1&d=2 gone, https://cdn/y?s=1", "https://cdn/x?*** gone, https://cdn/y?***"),
    ],
)
def test_urls_in_texts_keep_no_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
