from __future__ import annotations

import pytest

from embedstream.shared import settings_page
from embedstream.shared.errors import Misconfigured
from embedstream.shared.settings_page import choices_of, default_of, range_of


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("port", "0 to 65535"),
        ("batch_tokens", "at least 0"),
        ("max_wait_s", "above 0"),
        ("request_timeout_s", "above 0, at most 86400"),
        ("key_prefix", r"`[\w.-]{1,64}`"),
        ("max_model_len", "at least 1"),
        ("host", ""),
    ],
)
def test_bounds_in_words(name: str, words: str) -> None:
    assert range_of(name) == words


def test_choices_and_defaults() -> None:
    assert choices_of("dtype") == ["auto", "float32", "float16", "bfloat16"]
    assert choices_of("long_inputs") == ["error", "truncate", "chunk"]
    assert choices_of("auto_truncate") == ["true", "false"]
    assert choices_of("port") == []
    assert (default_of("auto_truncate"), default_of("log_level"), default_of("api_key")) == ("false", "info", None)


def test_a_wrong_environment_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_REDIS_URL", "secret@host")
    monkeypatch.setenv("EMBEDSTREAM_RESULT_TTL_S", "0")
    with pytest.raises(Misconfigured) as caught:
        settings_page.read_environment()
    assert str(caught.value) == (
        "EMBEDSTREAM_REDIS_URL is not a redis://, rediss:// or unix:// URL; "
        "EMBEDSTREAM_RESULT_TTL_S is '0', but should be greater than or equal to 1"
    )


def test_only_the_table_of_a_page_is_rewritten() -> None:
    page = "before\n\n| flag | x |\n| --- | --- |\n| old | |\n\nafter\n\n| code | y |\n"
    assert settings_page.rewritten(page) == f"before\n\n{settings_page.table()}\nafter\n\n| code | y |\n"
