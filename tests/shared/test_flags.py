from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated

import pytest
from pydantic import ValidationError
from typer import Option
from typer.testing import CliRunner

from embedstream.shared import flags
from embedstream.shared.errors import (
    EmbedstreamError,
    InputTooLong,
    InvalidInput,
    JobFailed,
    ResultTimeout,
    ServerNotFound,
    Unavailable,
)
from embedstream.shared.settings import Dtype, PoolingName, Role, Settings, flag_of, roles_of, variable_of
from embedstream.shared.settings_page import problems_of


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("EMBEDSTREAM_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("COLUMNS", "200")


class Command:
    """A command of one role that keeps the settings it was called with."""

    def __init__(self, role: Role = Role.SERVE, error: EmbedstreamError | None = None) -> None:
        self.calls: list[tuple[Settings, int | None]] = []

        def function(settings: Settings, fd: Annotated[int | None, Option("--fd", hidden=True)] = None) -> int:
            """Do what the role does."""
            self.calls.append((settings, fd))
            if error is not None:
                raise error
            return 0

        self._app = flags.new_app(alone=True)
        self._app.command()(flags.command_of(role, function))

    def __call__(self, *arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(self._app, arguments)
        assert result.exit_code == code, result.output
        return result.output

    @property
    def settings(self) -> Settings:
        return self.calls[-1][0]


@pytest.mark.parametrize("role", list(Role))
def test_every_setting_of_a_role_is_a_flag_and_no_other(role: Role) -> None:
    shown = Command(role)("--help")
    words = set(shown.split())
    for name in Settings.model_fields:
        assert (flag_of(name) in words) == (role in roles_of(name)), name
        assert (f"{variable_of(name)}]" in words) == (role in roles_of(name)), name
    assert "Do what the role does." in shown
    assert "--fd" not in words


def test_defaults_and_choices_are_shown() -> None:
    shown = Command()("--help")
    assert "[default: 8000; 0 to 65535; env: EMBEDSTREAM_PORT]" in " ".join(shown.split())
    assert "<auto|float32|float16|bfloat16>" in shown
    assert "--no-auto-truncate" in shown
    assert "default: false; env: EMBEDSTREAM_AUTO_TRUNCATE" in " ".join(shown.split())
    assert "[default: auto; env: EMBEDSTREAM_DTYPE]" in " ".join(shown.split())


def test_nothing_given_is_nothing_set() -> None:
    command = Command()
    command()
    assert command.settings == Settings()
    assert command.settings.model_fields_set == set()


def test_flags_win_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_PORT", "1111")
    monkeypatch.setenv("EMBEDSTREAM_HOST", "::1")
    monkeypatch.setenv("EMBEDSTREAM_AUTO_TRUNCATE", "true")
    command = Command()
    command("--port", "2222", "--no-auto-truncate")
    assert (command.settings.port, command.settings.host, command.settings.auto_truncate) == (2222, "::1", False)
    assert command.settings.model_fields_set == {"port", "host", "auto_truncate"}


def test_each_kind_of_flag() -> None:
    command = Command()
    command(
        *(
            "--dtype",
            "bfloat16",
            "--pooling",
            "cls",
            "--request-timeout-s",
            "2.5",
            "--data-dir",
            "d",
            "--auto-truncate",
        ),
        *("--api-key", "a", "--api-key", "b,c", "--fd", "7"),
    )
    settings, fd = command.calls[-1]
    assert (settings.dtype, settings.pooling, settings.request_timeout_s) == (Dtype.BFLOAT16, PoolingName.CLS, 2.5)
    assert (str(settings.data_dir), settings.auto_truncate, settings.api_key) == ("d", True, ("a", "b", "c"))
    assert fd == 7


def test_a_wrong_flag_names_itself_its_value_and_the_bound() -> None:
    shown = Command()("--port", "70000", "--request-timeout-s", "soon", "--dtype", "int8", code=2)
    assert shown.splitlines() == [
        "embedstream: --port is '70000', but should be less than or equal to 65535",
        "embedstream: --dtype is 'int8', but should be 'auto', 'float32', 'float16' or 'bfloat16'",
        "embedstream: --request-timeout-s is 'soon', but should be a valid number, unable to parse string as a number",
    ]


def test_a_wrong_variable_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_MATRYOSHKA_DIMS", "12,x")
    shown = Command()(code=2)
    assert shown.startswith("embedstream: EMBEDSTREAM_MATRYOSHKA_DIMS is '12,x', but neither `any` nor `off`")


def test_secret_values_are_not_repeated() -> None:
    error = ValidationError.from_exception_data(
        "Settings",
        [
            {"type": "tuple_type", "loc": ("api_key",), "input": "secret-1"},
            {"type": "string_type", "loc": ("redis_url",), "input": "secret-2"},
        ],
    )
    assert problems_of(error, {"api_key": ["secret-1"]}) == [
        "--api-key should be a valid tuple",
        "EMBEDSTREAM_REDIS_URL should be a valid string",
    ]


def test_a_url_that_is_none_is_told_without_it() -> None:
    shown = Command()("--redis-url", "user:secret@host", code=2)
    assert shown == "embedstream: --redis-url is not a redis://, rediss:// or unix:// URL\n"


def test_unknown_variables_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_PROT", "1")
    assert "EMBEDSTREAM_PROT is set, but there is no such setting" in Command()()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("away"), 69),
        (ServerNotFound("none"), 69),
        (InvalidInput("bad"), 65),
        (InputTooLong("long"), 65),
        (ResultTimeout("late"), 75),
        (JobFailed("failed"), 70),
    ],
)
def test_known_errors_end_as_one_line(error: EmbedstreamError, code: int) -> None:
    assert Command(error=error)(code=code) == f"embedstream: {error}\n"


def test_settings_travel_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        api_key=("a", "b"),
        dtype=Dtype.FLOAT16,
        auto_truncate=True,
        request_timeout_s=2.5,
        port=0,
        redis_url="redis://x",
    )
    variables = flags.environment_of(settings, port=8123, threads=2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    received = Settings()
    assert received == settings.model_copy(update={"port": 8123, "threads": 2})
    assert received.model_fields_set == settings.model_fields_set | {"threads"}
    assert flags.without_settings({**variables, "PATH": "p", "embedstream_port": "1"}) == {"PATH": "p"}


def test_torch_is_not_needed() -> None:
    code = "import sys, embedstream.shared.flags; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
