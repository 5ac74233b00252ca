from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.contract.models import MODELS, write

from embedstream.consumer import reference
from embedstream.consumer.examination import Check, State, examine
from embedstream.shared.errors import Misconfigured
from embedstream.shared.settings import Dtype, PoolingName, Settings


def compared(folder: Path, **changes: Any) -> dict[str, Check]:
    settings = Settings(**{"model": str(folder), "dtype": Dtype.FLOAT32, "device": "cpu", "threads": 1, **changes})
    steps: list[str] = []
    _, examined = examine(settings, steps.append)
    checks = reference.compare(settings, examined, steps.append)
    assert "loading it with sentence-transformers" in steps
    return {check.name: check for check in checks}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_same_vectors(tiny_bert: Callable[..., Path], tiny_decoder: Callable[..., Path], kind: str) -> None:
    checks = compared(tiny_bert("mean") if kind == "encoder" else tiny_decoder())
    assert [*checks] == ["longest input", "tokens", "vectors of tokens", "vectors"]
    assert not [check for check in checks.values() if check.state is not State.OK]
    assert checks["vectors"].numbers["error"] <= 1e-5
    assert checks["vectors"].found.endswith("35 texts")


def test_prompts_layers_and_sizes(tmp_path: Path, wordpiece_json: str) -> None:
    """Two ways of pooling without the prompt, Dense, LayerNorm, Normalize."""
    checks = compared(write(MODELS["headed"], wordpiece_json, tmp_path), matryoshka_dims="4")
    both = ["encode_query", "encode_document"]
    sizes = ["vectors of tokens", "vectors", "4 components", "prompt query", "prompt document", *both]
    assert [*checks] == ["longest input", "tokens", *sizes]
    assert not [check for check in checks.values() if check.state is not State.OK]


@pytest.mark.parametrize(("dims", "compared_size"), [("32,16,8", "16 components"), ("any", "16 components")])
def test_a_size_below_the_full_one(tiny_bert: Callable[..., Path], dims: str, compared_size: str) -> None:
    checks = compared(tiny_bert("mean"), matryoshka_dims=dims)
    assert [name for name in checks if name.endswith(" components")] == [compared_size]
    assert checks[compared_size].state is State.OK


def test_another_default_prompt_shows(tmp_path: Path, wordpiece_json: str) -> None:
    checks = compared(write(MODELS["headed"], wordpiece_json, tmp_path), default_prompt_name="query")
    assert [name for name, check in checks.items() if check.state is State.FAILED] == [
        *("tokens", "vectors of tokens", "vectors")
    ]
    assert checks["tokens"].remedy.startswith("--default-prompt-name overrides the model's files")
    assert checks["vectors of tokens"].found.startswith("of the size 5x32, and 3x32 with sentence-transformers (")


def test_a_shorter_limit_cuts_on_both_sides(tiny_bert: Callable[..., Path]) -> None:
    checks = compared(tiny_bert("mean"), max_model_len=20)
    assert {check.state for check in checks.values()} == {State.OK}
    assert checks["longest input"].found == "20 tokens on both sides, as --max-model-len says"


def test_another_pooling_shows(tiny_bert: Callable[..., Path]) -> None:
    checks = compared(tiny_bert("mean"), pooling=PoolingName.CLS)
    assert [name for name, check in checks.items() if check.state is State.FAILED] == ["vectors"]
    assert checks["vectors"].remedy == "--pooling overrides the model's files: leave it out unless you mean it"


def test_vectors_of_tokens_alone(tiny_bert: Callable[..., Path]) -> None:
    checks = compared(tiny_bert("mean"), pooling=PoolingName.ALL)
    assert [*checks] == ["longest input", "tokens", "vectors of tokens"]
    assert {check.state for check in checks.values()} == {State.OK}


def test_without_a_recipe_vectors_differ_in_length_alone(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("mean")
    (folder / "modules.json").unlink()
    vectors = compared(folder)["vectors"]
    assert vectors.state is State.WARNING
    assert "--no-normalize" in vectors.remedy
    assert compared(folder, normalize=False)["vectors"].state is State.OK


def test_lengths_that_differ_are_told_from_directions(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("mean", normalize=False)
    checks = compared(folder, normalize=True)
    assert checks["vectors"].remedy.startswith("the directions agree, the lengths do not")


def test_a_model_it_does_not_load(tiny_bert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\nmore")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer.__init__", fail)
    folder = tiny_bert("mean")
    (check,) = compared(folder).values()
    assert (check.state, check.found) == (State.FAILED, f"sentence-transformers does not load {folder}: no")


def test_without_the_library_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "find_spec", lambda _: None)
    with pytest.raises(Misconfigured, match="pip install sentence-transformers"):
        reference.require()
