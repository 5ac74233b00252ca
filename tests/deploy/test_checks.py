"""What `serve` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedstream.api import foreign_ids
from embedstream.deploy import cli, local
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that anything was started with."""
    calls: list[Settings] = []

    def run(settings: Settings) -> int:
        calls.append(settings)
        return 0

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    return calls


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 78, result.output
    (line,) = result.output.splitlines()
    return line


@pytest.mark.parametrize("model", ["/no/such/dir", "no-such-name", "a/b/c"])
def test_a_model_that_can_be_nowhere(started: list[Settings], model: str) -> None:
    assert f"no model {model!r}" in refused("--model", model)
    assert started == []


def test_a_folder_that_holds_no_model(started: list[Settings], tmp_path: Path) -> None:
    assert f"{tmp_path} holds neither config.json" in refused("--model", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "a revision (main) only means something on the Hub" in refused(
        "--model", str(tmp_path), "--revision", "main"
    )
    assert started == []


def test_an_id_of_the_hub_is_fetched_later_unless_that_is_forbidden(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert CliRunner().invoke(cli.app, ["serve", "--model", "no-such/model"]).exit_code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no-such/model is no directory here" in refused("--model", "no-such/model")
    assert len(started) == 1


def test_files_that_settings_name(started: list[Settings], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert f"{missing} cannot be read" in refused("--api-keys-file", str(missing))
    assert f"{missing}: there is no such file" in refused("--chat-template", str(missing))
    assert str(missing) in refused("--token-ids", "cl100k", "--cl100k-vocabulary", str(missing))
    assert started == []


def test_what_is_not_asked_for_is_not_looked_at(started: list[Settings]) -> None:
    arguments = ["serve", "--consumers", "0", "--model", "/no/such/dir", "--chat-template", "/no/such/file"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert CliRunner().invoke(cli.app, ["serve", "--cl100k-vocabulary", "/no/such/file"]).exit_code == 0
    assert len(started) == 2


def test_tiktoken_is_looked_for_and_not_loaded(started: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_ids, "find_spec", lambda _: None)
    monkeypatch.setattr(foreign_ids, "_vocabulary", lambda _: b"")
    assert "needs the package tiktoken" in refused("--token-ids", "cl100k")
    assert started == []
