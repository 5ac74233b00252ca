"""Any JSON in any file of a model makes a recipe, or one line that says what is wrong with it."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.head_files import Step
from embedstream.shared.models import ModelFiles
from embedstream.shared.recipe import Recipe
from embedstream.shared.recipe_files import read_head, read_recipe
from embedstream.shared.settings import Settings

OLD = "sentence_transformers.models"
FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{OLD}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{OLD}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{OLD}.Dense"},
        {"idx": 3, "name": "3", "path": "3_LayerNorm", "type": f"{OLD}.LayerNorm"},
        {"idx": 4, "name": "4", "path": "4_Normalize", "type": f"{OLD}.Normalize"},
    ],
    "config.json": {
        "architectures": ["BertModel"],
        "hidden_size": 32,
        "is_matryoshka": True,
        "matryoshka_dimensions": [8, 16],
        "max_position_embeddings": 64,
        "model_type": "bert",
        "pad_token_id": 0,
        "task_instructions": {"text-matching": "Match: "},
        "text_config": {"hidden_size": 32},
        "vocab_size": 100,
    },
    "config_sentence_transformers.json": {
        "default_prompt_name": "query",
        "model_type": "SentenceTransformer",
        "prompts": {"query": "query: ", "passage": None},
        "requirements": {"python": ">=3", "torch": {"specifier": ">=2", "reason": "why not"}},
        "similarity_fn_name": "cosine",
        "truncate_dim": 6,
    },
    "sentence_bert_config.json": {
        "do_lower_case": False,
        "max_seq_length": 48,
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "model_kwargs": {"dtype": "float32"},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"image": {}},
        "processor_kwargs": {"model_max_length": 40},
        "transformer_task": "feature-extraction",
    },
    "tokenizer_config.json": {"model_max_length": 48, "truncation_side": "right"},
    "1_Pooling/config.json": {"include_prompt": True, "pooling_mode": ["cls", "mean"]},
    "2_Dense/config.json": {
        "activation_function": "torch.nn.modules.activation.Tanh",
        "bias": True,
        "in_features": 64,
        "module_input_name": "sentence_embedding",
        "out_features": 8,
        "use_residual": False,
    },
    "3_LayerNorm/config.json": {"dimension": 8},
    "4_Normalize/config.json": {"module_input_name": "sentence_embedding"},
}

WORDS = st.sampled_from(
    ["", "cls", "mean", "text", "message", "query", "-", "role:query", "bert", "qwen2", "BertForCausalLM", "..", "\0"]
    + [f"{OLD}.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Dropout", "Router")]
)
NUMBERS = st.integers() | st.sampled_from([0, 1, 8, 10**30, -1]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(st.characters(), max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3)
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in a value, itself among them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(each for key, inner in items for each in _places(inner, (*place, key)))]


PLACES = [(name, *place) for name, content in FILES.items() for place in _places(content)]


def read(files: dict[str, Any], settings: Settings) -> tuple[Recipe, tuple[Step, ...]] | None:
    """The recipe and the head, or None where there is an error in one line."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            path = Path(name) / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        found = ModelFiles(Path(name), "r")
        try:
            recipe = read_recipe(found, settings)
            return recipe, read_head(found, recipe)
        except ModelLoadError as error:
            message = str(error)
    assert "\n" not in message
    assert message.encode()
    assert len(message) < 1000
    return None


def test_the_files_that_are_changed_here_are_right() -> None:
    result = read(FILES, Settings())
    assert result is not None
    recipe, steps = result
    assert (recipe.pooling_name, recipe.dimension, recipe.normalize) == ("cls+mean", 6, False)
    assert recipe.head == ", ".join(map(str, steps)) == "dense 64>8 tanh, layer norm, normalize, cut to 6"


@settings(max_examples=100)
@given(
    changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3),
    gone=st.sets(st.sampled_from(sorted(FILES)), max_size=2),
)
def test_any_value_anywhere(changes: list[tuple[tuple[Any, ...], Any]], gone: set[str]) -> None:
    files = json.loads(json.dumps(FILES))
    for (*way, last), value in changes:
        holder = files
        with suppress(LookupError, TypeError):  # an earlier change may have put something else there
            for key in way:
                holder = holder[key]
            holder[last] = value
    result = read({name: content for name, content in files.items() if name not in gone}, Settings())
    if result is not None:
        recipe, _ = result
        card = ModelCard("m", recipe, "{}", "r")
        assert ModelCard.decode(card.encode(), card.fingerprint, "m").recipe.pooling == recipe.pooling
