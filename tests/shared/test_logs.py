from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from embedstream.shared.logs import configure, get_logger
from embedstream.shared.settings import LogFormat, Settings

pytestmark = pytest.mark.usefixtures("same_logging")


def test_lines_go_to_stderr_with_their_role(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings(log_format=LogFormat.JSON), "api")
    get_logger().info("batch.embedded", jobs=3)
    get_logger().debug("not shown")
    out, err = capsys.readouterr()
    assert out == ""
    line = json.loads(err)
    assert (line["event"], line["jobs"], line["role"], line["level"]) == ("batch.embedded", 3, "api", "info")


def test_warnings_of_libraries_come_along(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings(log_format=LogFormat.JSON), "api")
    logging.getLogger("some.library").warning("mind %s", "the gap")
    logging.getLogger("some.library").info("not shown")
    line = json.loads(capsys.readouterr().err)
    assert (line["logger"], line["message"], line["level"]) == ("some.library", "mind the gap", "warning")


def test_tracebacks_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings(), "api")
    try:
        raise KeyError("lost")
    except KeyError:
        get_logger().exception("batch.failed")
    assert "KeyError: 'lost'" in capsys.readouterr().err


def test_a_library_user_finds_stdout_clean() -> None:
    code = "from embedstream.shared.logs import get_logger as g; g().info('quiet'); g().warning('heard', why=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "heard" in done.stderr
    assert "quiet" not in done.stderr
