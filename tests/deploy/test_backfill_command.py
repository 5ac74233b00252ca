from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embedstream.deploy import backfill as command
from embedstream.deploy import backfill_events, backfill_run, cli
from embedstream.producer.backfill.blocks import BadReason
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.shared.jobs import LongInputs
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.settings import Role, Settings, flag_of, roles_of

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("home", "same_logging")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BackfillOptions]:
    seen: list[BackfillOptions] = []

    def run(_settings: Any, options: BackfillOptions, **_: Any) -> int:
        seen.append(options)
        return 65

    monkeypatch.setattr(backfill_run, "run", run)
    return seen


def test_the_defaults_are_those_of_the_contract(asked: list[BackfillOptions]) -> None:
    result = CliRunner().invoke(cli.app, ["backfill", "in", "out"])
    assert result.exit_code == 65, result.output
    (options,) = asked
    assert options.input == InputOptions("in")
    assert options.output == OutputOptions("out")
    assert options.vectors.lane is Lane.BULK
    assert options.vectors.truncate_prompt_tokens is None
    assert options.vectors.timeout_s is None
    assert options.state is None
    assert options.vectors.vectors == VectorOptions()


def test_flags_become_options(asked: list[BackfillOptions]) -> None:
    flags = ["--text-column", "title", "--text-column", "body", "--template", "{title}: {body}", "--id-column", "id"]
    flags += ["--carry", "lang", "--carry", "year", "--where", "lang = 'en'", "--format", "csv", "--truncate"]
    flags += ["--output-format", "arrow", "--vector-column", "v", "--vector-dtype", "float16", "--dimensions", "64"]
    flags += ["--no-normalize", "--task", "retrieval", "--input-type", "document", "--long-inputs", "chunk"]
    flags += ["--part-rows", "7", "--window-bytes", "1048576", "--credit-s", "3", "--patience-s", "4"]
    flags += ["--state", "kept", "--request-timeout-s", "9"]
    result = CliRunner().invoke(cli.app, ["backfill", "in", "out", *flags, "--tokenizer-processes", "5"])
    assert result.exit_code == 65, result.output
    (options,) = asked
    columns = ("title", "body")
    assert options.input == InputOptions("in", "csv", columns, "{title}: {body}", "id", ("lang", "year"), "lang = 'en'")
    assert options.output == OutputOptions("out", "arrow", "v")
    assert options.vectors.vectors == VectorOptions(64, False, VectorType.FLOAT16)
    assert options.vectors.truncate_prompt_tokens == -1
    assert options.vectors.long_inputs is LongInputs.CHUNK
    assert (options.vectors.adapter, options.vectors.prompt) != ("", "")
    assert (options.part_rows, options.window_bytes, options.credit_s) == (7, 1_048_576, 3.0)
    assert (options.patience_s, options.tokenizer_processes) == (4.0, 5)
    assert (options.state, options.vectors.timeout_s) == (Path("kept"), 9.0)


def test_without_pyarrow_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_PACKAGES", ("pyarrow_that_is_missing", "json"))
    result = CliRunner().invoke(cli.app, ["backfill", "in", "out"])
    assert result.exit_code == 78
    assert result.output == (
        "embedstream: pyarrow_that_is_missing not installed; a backfill needs `pip install '.[bulk]'` in "
        "embedstream's folder\n"
    )


def test_the_page_knows_every_flag_and_no_other() -> None:
    page = (ROOT / "docs" / "backfill.md").read_text()
    own = {f"--{name.replace('_', '-')}" for name in inspect.signature(command.backfill).parameters}
    own = own - {"--settings", "--source", "--target", "--input-format", "--as-json"} | {"--format", "--json"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page))
    assert own <= named
    assert named <= own | {flag_of(name) for name in Settings.model_fields} | {"--no-normalize"}
    limits = {name for name in Settings.model_fields if roles_of(name) == (Role.BACKFILL,)}
    assert {flag_of(name) for name in limits} <= named


def test_the_page_knows_every_event() -> None:
    page = (ROOT / "docs" / "backfill.md").read_text()
    events = set(re.findall(r'_tell\(\s*"(\w+)"', Path(backfill_events.__file__).read_text()))
    assert events == set(
        re.findall(r"^\| `(\w+)` \| ", page[page.index("| event |") : page.index("## Exit codes")], re.MULTILINE)
    )


def test_the_page_knows_every_reason_of_a_bad_row() -> None:
    page = (ROOT / "docs" / "backfill.md").read_text()
    table = page[page.index("| reason |") : page.index("## Progress")]
    assert re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE) == list(BadReason)
