from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embedstream.consumer import reference, requirements
from embedstream.consumer.examination import Check, Examination, State
from embedstream.deploy import cli, doctor_view
from embedstream.shared import models

pytestmark = pytest.mark.usefixtures("home", "same_logging")

GOOD = Check("tokens", State.OK, "the same for 35 texts", numbers={"error": 0.0})
FOUND = Examination(
    {
        "files": {"model": "m", "path": "/models/" + "long/" * 60},
        "recipe": {
            "head": "",
            "normalize": True,
            "dimension": 1024,
            "prompts": {"query": "query:\n\x1b[31m", "none": ""},
            "adapters": ["a", "b"],
            "matryoshka_dims": [],
        },
    },
    [GOOD, Check("recipe", State.WARNING, "no modules.json", "say it with --pooling")],
)


def doctor(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["doctor", "--device", "cpu", "--threads", "1", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_for_people() -> None:
    piped = io.StringIO()
    doctor_view.show(FOUND, piped)
    assert (
        piped.getvalue()
        == f"""\
files
  model  m
  path   /models/{"long/" * 60}

recipe
  head             none
  normalize        yes
  dimension        1,024
  prompts          query: "query:\\n\\x1b[31m"
                   none: ""
  adapters         a, b
  matryoshka_dims  none

checks
  ✓  tokens  the same for 35 texts
  !  recipe  no modules.json
             → say it with --pooling

Well, but see: recipe.
"""
    )


def test_the_verdict_names_what_failed() -> None:
    piped = io.StringIO()
    bad = Check("vectors", State.FAILED, "largest error 1")
    doctor_view.show(Examination({}, [GOOD], [bad]), piped)
    assert "  ✗  vectors  largest error 1\n\nNot well: vectors.\n" in piped.getvalue()
    doctor_view.show(Examination({}, [GOOD]), piped := io.StringIO())
    assert piped.getvalue().endswith("\nAll is well.\n")


def test_on_a_terminal_long_lines_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    doctor_view.show(FOUND, terminal)
    assert "\x1b[32m" in terminal.getvalue()
    assert "\x1b[31m" not in terminal.getvalue()
    assert max(map(len, terminal.getvalue().splitlines())) < 80


def test_without_utf_8_marks_are_words() -> None:
    written = io.BytesIO()
    ascii_only = io.TextIOWrapper(written, encoding="ascii")
    doctor_view.show(FOUND, ascii_only)
    ascii_only.flush()
    shown = written.getvalue().decode("ascii")
    assert "  ok       tokens  the same for 35 texts\n  warning  recipe  no modules.json\n" in shown
    assert " > say it with --pooling\n" in shown


def test_for_machines() -> None:
    fields = json.loads(doctor_view.as_json(FOUND))
    assert fields["recipe"]["prompts"] == FOUND.facts["recipe"]["prompts"]
    assert fields["checks"][0] == {
        "name": "tokens",
        "state": "ok",
        "found": "the same for 35 texts",
        "remedy": "",
        "numbers": {"error": 0.0},
    }
    assert (fields["against"], fields["passed"]) == ([], True)


def test_the_real_model_is_well() -> None:
    code, out, _ = doctor("--dtype", "float32", "--json", "--batch-tokens", "256", "--max-model-len", "64")
    assert code == 0
    fields: dict[str, Any] = json.loads(out)
    assert fields["files"]["model"] == "all-MiniLM-L6-v2"
    assert fields["recipe"]["dimension"] == 384
    assert [check["state"] for check in fields["checks"]] == ["ok"] * 4


def test_a_warning_of_the_loader_is_in_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models.locate("all-MiniLM-L6-v2").path, folder)
    (folder / "mine").mkdir()
    (folder / "mine" / "adapter_config.json").write_text("{}")
    code, out, err = doctor(str(folder), "--dtype", "float32", "--max-model-len", "16", "--batch-tokens", "64")
    assert (code, err) == (0, "")
    assert f"  !  adapter.left_out    adapter mine, path {folder}/mine, reason no adapter_model.safetensors\n" in out
    assert out.endswith("\nWell, but see: adapter.left_out.\n")


def test_a_wrong_setting_shows_against_sentence_transformers() -> None:
    arguments = ("--dtype", "float32", "--pooling", "cls", "--max-model-len", "32", "--batch-tokens", "256")
    code, out, _ = doctor("all-MiniLM-L6-v2", *arguments, "--against", "sentence-transformers")
    assert code == 1
    assert "  ✓  vectors of tokens  " in out
    assert "  ✗  vectors            largest error" in out
    assert "→ --pooling overrides the model's files" in out
    assert out.endswith("Not well: vectors.\n")


def test_no_such_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_MODEL", "all-MiniLM-L6-v2")
    code, out, err = doctor("nothing-here")
    assert (code, out) == (78, "")
    assert err.startswith("embedstream: no model 'nothing-here'")
    assert err.count("\n") == 1


def test_without_sentence_transformers_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "find_spec", lambda _: None)
    code, out, err = doctor("--against", "sentence-transformers")
    assert (code, out) == (78, "")
    assert err == (
        "embedstream: sentence-transformers is not installed; --against needs `pip install sentence-transformers`\n"
    )


def test_without_torch_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_PACKAGES", ("torch_that_is_missing",))
    code, out, err = doctor()
    assert (code, out) == (78, "")
    assert "torch_that_is_missing not installed" in err


def test_another_library_is_refused() -> None:
    code, _, err = doctor("--against", "guesses")
    assert code == 2
    assert "sentence-transformers" in err
