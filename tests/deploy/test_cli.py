from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from embedstream.api import __main__ as api_main
from embedstream.consumer import __main__ as consumer_main
from embedstream.consumer import requirements
from embedstream.deploy import cli, embed
from embedstream.deploy.welcome import curl_line, ready_block
from embedstream.shared import runfile
from embedstream.shared.errors import InputTooLong
from embedstream.shared.logs import get_logger
from embedstream.shared.processes import own_identity
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.usefixtures("home", "same_logging")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env={**os.environ})


class FakeProducer:
    """Stands for `SyncProducer`: the vector of a text is its length and the number of texts sent with it."""

    calls: list[tuple[str | None, dict[str, Any]]]

    def __init__(self, url: str | None, *, model: str | None, settings: Settings) -> None:
        assert settings.redis_url == url
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    def embed(self, texts: list[str], **options: Any) -> NDArray[np.float32]:
        self.calls.append((self._url, options))
        get_logger().info("a note")
        get_logger().warning("a warning")
        if "too long" in texts:
            raise InputTooLong("has 300 tokens, the model reads 256")
        return np.array([[len(text), len(texts)] for text in texts], np.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, dict[str, Any]]]:
    monkeypatch.setattr("embedstream.producer.SyncProducer", FakeProducer)
    FakeProducer.calls = []
    return FakeProducer.calls


@pytest.fixture
def server() -> Iterator[str]:
    path = runfile.write(
        runfile.RunFile(own_identity(), "unix:///x/v.sock", "http://127.0.0.1:1", 1, "some", ("some",), "ek")
    )
    yield "unix:///x/v.sock"
    path.unlink()


def test_version_and_help() -> None:
    assert python("-m", "embedstream.deploy", "--version").stdout.startswith("embedstream 0.")
    shown = python("-m", "embedstream.deploy", "--help")
    assert shown.returncode == 0
    assert all(f"  {command} " in shown.stdout for command in ("serve", "api", "consumer", "embed"))


def test_the_command_loads_no_role() -> None:
    code = (
        "import sys, embedstream.deploy.cli; heavy = {'torch', 'transformers', 'numpy', 'starlette', 'redis'};"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    assert python("-c", code).stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("embedstream.deploy", "embed", "text"),
        ("embedstream.deploy", "api"),
        ("embedstream.deploy", "consumer"),
        ("embedstream.api",),
        ("embedstream.consumer",),
    ],
)
def test_without_a_server_one_line_names_serve(arguments: tuple[str, ...]) -> None:
    done = python("-m", *arguments)
    assert done.returncode == 69
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "embedstream serve" in done.stderr


def test_a_wrong_lane_is_told_in_our_words() -> None:
    result = CliRunner().invoke(cli.app, ["dead-letters", "list", "--lane", "x"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == "Error: Invalid value for '--lane': 'x' is none of interactive, bulk."


@pytest.mark.parametrize("command", ["consumer", "serve"])
def test_without_torch_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(requirements, "_PACKAGES", ("torch_that_is_missing", "json"))
    result = CliRunner().invoke(cli.app, [command])
    assert result.exit_code == 78
    assert result.output == (
        "embedstream: torch_that_is_missing not installed; a consumer needs `pip install '.[consumer]'` in "
        "embedstream's folder\n"
    )


def test_a_consumer_alone_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_PACKAGES", ("torch_that_is_missing",))
    assert consumer_main.consume(Settings()) == 78


OPTIONS: dict[str, Any] = dict.fromkeys(
    ("dimensions", "normalize", "truncate_prompt_tokens", "prompt_name", "input_type", "task")
)


def test_embed_prints_a_line_for_each_text(server: str, calls: list[tuple[str | None, dict[str, Any]]]) -> None:
    result = CliRunner().invoke(cli.app, ["embed", "a", "bcé", "--dimensions", "2", "--no-normalize", "--truncate"])
    assert result.exit_code == 0, result.output
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"index": 0, "text": "a", "embedding": [1.0, 2.0]},
        {"index": 1, "text": "bcé", "embedding": [3.0, 2.0]},
    ]
    assert "a warning" in result.stderr
    assert "a note" not in result.stderr
    assert calls == [(server, OPTIONS | {"dimensions": 2, "normalize": False, "truncate_prompt_tokens": -1})]


def test_embed_asks_for_prompt_and_adapter(server: str, calls: list[tuple[str | None, dict[str, Any]]]) -> None:
    flags = ["--prompt-name", "", "--input-type", "query", "--task", "retrieval.query"]
    assert CliRunner().invoke(cli.app, ["embed", "a", *flags]).exit_code == 0
    asked = {"prompt_name": "", "input_type": "query", "task": "retrieval.query"}
    assert calls == [(server, OPTIONS | asked)]


def test_embed_reads_lines(
    server: str, calls: list[tuple[str | None, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_SLICE", 2)
    result = CliRunner().invoke(cli.app, ["embed"], input="one\r\ntwo \nthree")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["index"], line["text"]) for line in lines] == [(0, "one"), (1, "two "), (2, "three")]
    assert calls == [(server, OPTIONS)] * 2


def test_a_dash_is_stdin_and_an_empty_line_an_empty_text(
    server: str, calls: list[tuple[str | None, dict[str, Any]]]
) -> None:
    result = CliRunner().invoke(cli.app, ["embed", "-"], input="one\n\nthree\n")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["one", "", "three"]
    result = CliRunner().invoke(cli.app, ["embed", "-", "a"])
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["-", "a"]


def test_embed_on_a_terminal_without_texts(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    code = embed.run(Settings(), [], dimensions=None, normalize=None, truncate=False, stdin=Terminal())
    assert code == 2
    assert "stdin" in capsys.readouterr().err


def test_a_known_error_is_one_line(server: str, calls: list[tuple[str | None, dict[str, Any]]]) -> None:
    result = CliRunner().invoke(cli.app, ["embed", "too long"])
    assert (result.exit_code, result.stdout) == (65, "")
    assert result.stderr.splitlines()[-1] == (
        "embedstream: has 300 tokens, the model reads 256 With this command --truncate cuts it, and --long-inputs "
        "chunk embeds it piece by piece."
    )


def test_ctrl_c_is_no_traceback(
    server: str, calls: list[tuple[str | None, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeProducer, "embed", interrupted)
    result = CliRunner().invoke(cli.app, ["embed", "text"])
    assert (result.exit_code, result.output) == (130, "")


def test_a_run_folder_of_others_is_one_line(home: Path) -> None:
    (home / "run" / "embedstream").mkdir()
    (home / "run" / "embedstream").chmod(0o777)
    result = CliRunner().invoke(cli.app, ["embed", "text"])
    assert result.exit_code == 69
    assert "must be a folder of uid" in result.stderr


@pytest.mark.parametrize("name", ["api", "consumer"])
def test_roles_get_the_servers_settings(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[Any] = []

    def run(*arguments: Any) -> int:
        seen.append(arguments)
        return 7

    role = ModuleType(f"embedstream.{name}.main")
    role.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, role.__name__, role)
    arguments = ["--fd", "5"] if name == "api" else []
    assert CliRunner().invoke(cli.app, [name, *arguments]).exit_code == 7
    settings, *rest = seen[0]
    assert (settings.redis_url, settings.model, rest) == (server, "some", [5] if name == "api" else [])
    alone = api_main.serve_http(Settings(), 5) if name == "api" else consumer_main.consume(Settings())
    assert alone == 7
    assert seen[1] == seen[0]


def test_a_server_without_consumers_says_how_to_start_one() -> None:
    block = ready_block(Settings(consumers=0, redis_url="redis://u:p@q:1"), "http://x", "redis://u:p@q:1", elapsed_s=1)
    assert "waits for consumers: embedstream consumer --redis-url 'redis://u:***@q:1'" in block
    assert "ready" not in block


def test_serve_says_whether_the_queue_is_kept() -> None:
    def block(settings: Settings) -> str:
        return ready_block(settings, "http://x", "unix:///v.sock", elapsed_s=1)

    assert block(Settings()).count("lives in memory") == 1
    assert "--data-dir" in block(Settings())
    assert "  The queue is kept in /d.\n" in block(Settings(data_dir=Path("/d")))
    assert "The queue" not in block(Settings(redis_url="redis://q"))


def test_the_curl_line_survives_a_shell() -> None:
    line = curl_line("http://127.0.0.1:1", "it's", with_key=True)
    shown = subprocess.run(
        ["/bin/sh", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
        env={"EMBEDSTREAM_API_KEY": "key"},
    ).stdout.splitlines()
    assert shown[0] == "http://127.0.0.1:1/v1/embeddings"
    assert "Authorization: Bearer key" in shown
    assert json.loads(shown[-1]) == {"model": "it's", "input": "Hello, world"}
