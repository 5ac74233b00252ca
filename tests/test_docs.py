"""The pages say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from embedstream.api.errors import TABLE
from embedstream.api.schemas import EmbeddingRequest
from embedstream.shared import exits, metrics, settings_page
from embedstream.shared.architectures import MODEL_TYPES
from embedstream.shared.settings import Role, Settings, flag_of, roles_of

ROOT = Path(__file__).resolve().parent.parent


def test_the_settings_page_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert settings_page.rewritten(page) == page, "make settings-page writes it anew"
    rows = re.findall(r"^\| `(--[\w-]+)` \|(?:[^|]*\|){5}$", page, re.MULTILINE)
    assert rows == [flag_of(name) for name in Settings.model_fields]


def test_the_exit_codes_are_those_of_the_code() -> None:
    assert exits.__doc__ is not None
    table = exits.__doc__[exits.__doc__.index("| code |") :]
    assert table in (ROOT / "docs" / "settings.md").read_text()


def test_the_readme_shows_the_two_commands_and_common_flags() -> None:
    page = (ROOT / "README.md").read_text()
    assert "\nmake run\n" in page
    assert "\nmake test\n" in page
    for flag in re.findall(r"`(--[\w-]+)`", page):
        assert flag in {flag_of(name) for name in Settings.model_fields}, flag


def test_the_http_page_lists_every_field_and_every_error() -> None:
    page = (ROOT / "docs" / "http.md").read_text()
    fields = set(re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)) | {"use_activation"}
    assert fields == set(EmbeddingRequest.model_fields)
    assert "`use_activation` is the same" in page
    rows = {(int(status), kind) for status, kind in re.findall(r"^\| (\d{3}) \| `([\w ]+)` \|", page, re.MULTILINE)}
    assert rows == {(row.status, row.type) for row in TABLE.values()} | {(405, "MethodNotAllowedError")}


def test_the_metrics_page_lists_every_metric() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| \S.* \|.*\|$", page, re.MULTILINE)
    expected = []
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            expected.append((name, family.type, ", ".join(f"`{label}`" for label in metric._labelnames)))
    assert rows == expected


def test_the_models_page_lists_the_architectures_with_a_pooling_of_their_own() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    listed = page[page.index("values of `model_type`") : page.index("**Flags** override")]
    assert set(re.findall(r"`([\w-]+)`", listed)) - {"model_type", "--pooling"} == MODEL_TYPES


def test_every_setting_is_read_by_some_command() -> None:
    for name in Settings.model_fields:
        assert set(roles_of(name)) <= set(Role)
        assert roles_of(name), name


def test_links_between_pages_lead_somewhere() -> None:
    pages = ["README.md", "CONTRIBUTING.md", "examples/README.md"]
    for page in [*(ROOT / name for name in pages), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_example_is_listed() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    listed = re.findall(r"^\| \[([\w.]+)[^\]]*\]\(\1\)", page, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
