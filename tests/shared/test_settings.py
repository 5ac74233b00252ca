from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from embedstream.shared.keys import Keys
from embedstream.shared.settings import LongInputsName, Settings, is_hub_id, unknown_variables, variable_of


def test_the_environment_sets_what_flags_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_PORT", "8123")
    monkeypatch.setenv("EMBEDSTREAM_API_KEY", "one, two,")
    assert Settings().port == 8123
    assert Settings(port=9000).port == 9000
    assert Settings().api_key == ("one", "two")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc] # that it is frozen is the point


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("api_workers", "0"),
        ("matryoshka_dims", "64,x"),
        ("matryoshka_dims", "0"),
        ("key_prefix", "a{b}"),
        ("redis_url", "http://x"),
        ("request_timeout_s", "0"),
        ("log_level", "loud"),
        ("dtype", "int8"),
    ],
)
def test_values_out_of_bounds_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(variable_of(name), value)
    with pytest.raises(ValidationError, match=name):
        Settings()


def test_unknown_names_are_found() -> None:
    given = {"EMBEDSTREAM_PROT": "1", "EMBEDSTREAM_PORT": "1", "embedstream_host": "", "OTHER": ""}
    assert unknown_variables(given) == ["EMBEDSTREAM_PROT"]


def test_served_names(tmp_path: Path) -> None:
    assert Settings().served_names == ("all-MiniLM-L6-v2",)
    assert Settings(model="BAAI/bge-small-en").served_names == ("bge-small-en", "BAAI/bge-small-en")
    assert Settings(model=str(tmp_path)).served_names == (tmp_path.name,)
    assert Settings(model="x/y", served_model_name=("a", "b")).served_names == ("a", "b")


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    assert not is_hub_id("name")


def test_braces_in_a_name_keep_one_hash_tag() -> None:
    keys = Keys("ek", "a{b}c")
    assert keys.base == "ek:{a(b)c}"
    for key in (keys.live, keys.reply("x"), keys.result(b"\1"), keys.card(b"\2", 0), keys.dead_letters):
        assert key.startswith("ek:{a(b)c}:")


def test_one_policy_for_long_inputs() -> None:
    assert Settings().long_inputs_policy is LongInputsName.ERROR
    assert Settings(auto_truncate=True).long_inputs_policy is LongInputsName.TRUNCATE
    assert Settings(auto_truncate=True, long_inputs=LongInputsName.TRUNCATE).long_inputs_policy == "truncate"
    assert Settings(auto_truncate=False, long_inputs=LongInputsName.CHUNK).long_inputs_policy == "chunk"
    with pytest.raises(ValidationError, match="contradicts `--long-inputs chunk`"):
        Settings(auto_truncate=True, long_inputs=LongInputsName.CHUNK)
