"""The lines of docs/producers.md and of the README run as they stand, one after another, beside a real server."""

from __future__ import annotations

import ast
import re
from inspect import iscoroutine
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Serving

from embedstream.producer import Producer, SyncProducer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # of forks, since Python 3.12
]

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = re.compile(r"^```python(?: (\w+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = SNIPPET.findall((ROOT / "docs" / "producers.md").read_text())
README = [code for _, code in SNIPPET.findall((ROOT / "README.md").read_text()) if "embedstream.producer" in code]


def here(code: str, serving: Serving) -> str:
    """Other servers may be running on this machine."""
    return re.sub(r"\b((?:Sync)?Producer)\(\)", rf"\1({serving.redis_url!r})", code)


async def run(code: str, names: dict[str, Any]) -> None:
    compiled = compile(code, "producers.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    outcome = eval(compiled, names)  # noqa: S307 (our own page)
    if iscoroutine(outcome):
        await outcome


def test_every_part_of_the_library_is_shown() -> None:
    everything = "".join(code for _, code in SNIPPETS)
    public = [name for name in vars(Producer) if not name.startswith("_")]
    inner = {"redis", "max_undelivered_bytes", "open", "close", "forked", "mapper", "prepare", "run", "in_order"}
    page = (ROOT / "docs" / "producers.md").read_text()
    for name in set(public) - inner:
        assert re.search(rf"\b{name}\b", page), name
    for name in ("embed", "embed_query", "embed_document", "stream", "map", "submit", "result", "cancel", "forward"):
        assert f"producer.{name}(" in everything, name
    assert "dimensions=" not in everything  # the model of `make run` has one size; the one of these tests has any


async def test_the_asynchronous_lines(serving: Serving) -> None:
    async with Producer(serving.redis_url) as producer:
        names: dict[str, Any] = {"producer": producer}
        for kind, code in SNIPPETS:
            if not kind:
                await run(here(code, serving), names)
                names["producer"] = producer  # the first lines have closed theirs


def test_the_lines_without_a_loop(serving: Serving) -> None:
    with SyncProducer(serving.redis_url) as producer:
        for kind, code in SNIPPETS:
            if kind == "sync":
                exec(here(code, serving), {"producer": producer})  # noqa: S102 (our own page)


def test_the_lines_of_the_readme(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert README
    for code in README:
        exec(here(code, serving), {"__name__": "__main__"})  # noqa: S102 (our own page)
    assert capsys.readouterr().out.startswith("(2, 384)")
