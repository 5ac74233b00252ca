"""The lines of docs/clients.md and of the README run as they stand, but for the address and the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.clients.servers import Server, assert_same

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SNIPPETS = re.findall(r"^```python(?: (\w+))?\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
TEXTS = ["Hello, world", "Good morning"]


def test_every_client_has_its_lines() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:-1]
    assert [section.split("\n")[0] for section in sections] == [
        "openai",
        "LangChain",
        "LlamaIndex",
        "Haystack",
        "LiteLLM",
    ]
    assert all("```python" in section for section in sections)
    assert len(SNIPPETS) == PAGE.count("```python") == 10


@pytest.mark.parametrize(("kind", "code"), SNIPPETS)
def test_the_lines_give_the_vectors(server: Server, cl100k_server: Server, kind: str, code: str) -> None:
    target = {"": server, "cl100k": cl100k_server}[kind]
    assert "http://127.0.0.1:8000/v1" in code
    assert '"unused"' in code
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000/v1", target.base_url).replace('"unused"', repr(target.key)), names)  # noqa: S102 (our own page)
    assert_same(names["vectors"], server.embed(TEXTS))
