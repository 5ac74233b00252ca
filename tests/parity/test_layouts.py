"""Models of several families: with several layers, in the layout of old versions, and as transformers writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import PreTrainedModel

from embedstream.consumer.model import Model
from embedstream.shared.keys import Keys
from embedstream.shared.recipe import Pooling

from . import layout, served
from .families import FAMILIES, MAX_LENGTH, Family
from .layout import Dense, Normalize
from .texts import TEXTS

TOLERANCE = 1e-5
TABLE = 24
PROMPTS = {"query": "Represent the question: ", "document": "of text: "}
FLAGS = {
    "pooling_mode_cls_token": True,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": True,
    "pooling_mode_mean_sqrt_len_tokens": True,
    "pooling_mode_weightedmean_tokens": True,
    "pooling_mode_lasttoken": True,
}


def named(*names: str) -> Sequence[Family]:
    return [family for family in FAMILIES if family.name in names]


def in_the_old_layout(path: Path, settings_file: str) -> None:
    """Rewrite what sentence-transformers wrote to what its versions 0 to 2 wrote."""
    inner = path / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(path / name, inner / name)
    own = json.loads((path / "sentence_bert_config.json").read_text())
    (path / "sentence_bert_config.json").unlink()
    tokenizer = json.loads((inner / "tokenizer_config.json").read_text())
    limit = own.get("max_seq_length") or tokenizer["model_max_length"]
    (inner / settings_file).write_text(json.dumps({"max_seq_length": limit, "do_lower_case": True}))
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    listed = [
        {"idx": place, "name": str(place), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for place, (folder, kind) in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    dimension = json.loads((path / "1_Pooling" / "config.json").read_text())["embedding_dimension"]
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": dimension, **FLAGS}))
    (path / "config_sentence_transformers.json").unlink()


@pytest.mark.parametrize(
    ("family", "settings_file"),
    [
        *((family, "sentence_bert_config.json") for family in named("MPNet", "T5, encoder", "Qwen2")),
        *((family, "sentence_xlm-roberta_config.json") for family in named("XLM-RoBERTa")),
    ],
)
def test_the_old_layout(family: Family, settings_file: str, tmp_path: Path) -> None:
    path = layout.write(family, tmp_path)
    in_the_old_layout(path, settings_file)
    model, reference = Model.load(served.settings(path)), layout.read(family, path)
    assert model.recipe.max_length == reference.max_seq_length
    assert model.recipe.pooling == (
        Pooling.CLS, Pooling.MAX, Pooling.MEAN_SQRT_LEN, Pooling.WEIGHTED_MEAN, Pooling.LAST,
    )  # fmt: skip
    ours = served.ours(model, TEXTS, model.recipe.pooling)
    assert served.error(ours, served.theirs(reference, TEXTS)) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        *((family, TABLE) for family in named("BERT", "DeBERTa", "DeBERTa v2", "GPT-2", "GPT-J", "OPT, projected")),
        *((family, TABLE) for family in named("GPT-Neo, sliding window", "MobileBERT")),
        *((family, TABLE - 2) for family in named("MPNet", "XLM-RoBERTa", "Longformer")),
        *((family, MAX_LENGTH) for family in named("DeBERTa v3", "Nomic BERT", "Qwen3", "T5, encoder")),
    ],
)
def test_no_text_is_longer_than_the_table_of_positions(family: Family, limit: int, tmp_path: Path) -> None:
    """Whatever the module says: past the end of the table the model fails."""
    table = {key: TABLE for key in ("max_position_embeddings", "n_positions") if key in family.options}
    path = layout.write(replace(family, options={**family.options, **table}), tmp_path)
    own = path / "sentence_bert_config.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "max_seq_length": MAX_LENGTH}))
    model = Model.load(served.settings(path))
    assert model.recipe.max_length == limit
    (vector,) = served.ours(model, TEXTS[-1:], model.recipe.pooling)
    assert np.isfinite(vector).all()


@pytest.mark.parametrize(
    ("name", "kind", "pooling"),
    [
        ("BERT", transformers.BertForMaskedLM, Pooling.MEAN),
        ("Llama", transformers.LlamaForCausalLM, Pooling.LAST),
        ("Qwen2, both directions", transformers.Qwen2ForCausalLM, Pooling.MEAN),
        ("T5, encoder", transformers.T5ForConditionalGeneration, Pooling.MEAN),
    ],
)
def test_a_checkpoint_of_transformers_with_more_than_the_backbone(
    name: str, kind: type[PreTrainedModel], pooling: Pooling, tmp_path: Path
) -> None:
    """Tensors have a prefix or a decoder beside them, and nothing says how they are pooled."""
    (family,) = named(name)
    family = replace(family, model=kind)
    path = layout.write_bare(family, tmp_path)
    model, reference = Model.load(served.settings(path)), layout.read(family, path)
    assert model.recipe.pooling == (pooling,)
    ours = served.ours(model, TEXTS, model.recipe.pooling)
    assert served.error(ours, served.theirs(reference, TEXTS)) <= TOLERANCE


def layers(family: Family) -> Iterator[Any]:
    """What follows the transformer in published models of some families."""
    match family.name:
        case "Qwen3":  # as Qwen3-Embedding
            yield layout.pooling(family, ("lasttoken",))
        case "T5, encoder":  # as sentence-t5
            yield layout.pooling(family, ("mean",))
            yield Dense(family.dimension, 40, bias=False)
        case _:  # as EmbeddingGemma
            yield layout.pooling(family, ("mean", "max"))
            yield Dense(2 * family.dimension, 48)
            yield Dense(48, 20)
    yield Normalize()


@pytest.mark.parametrize(
    "family", named("Qwen3", "T5, encoder", "EmbeddingGemma (Gemma 3, both directions)"), ids=lambda family: family.name
)
async def test_whole_models(family: Family, tmp_path: Path, redis_url: str, keys: Keys) -> None:
    path = layout.write(family, tmp_path, *layers(family), prompts=PROMPTS)
    model, reference = Model.load(served.settings(path)), layout.read(family, path)
    for role, encode in (("query", reference.encode_query), ("document", reference.encode_document)):
        vectors = await served.through_queue(model, TEXTS, redis_url, keys, input_type=role)
        expected = [encode(text, show_progress_bar=False) for text in TEXTS]
        assert served.error(vectors, expected) <= TOLERANCE, role
    plain = await served.through_queue(model, TEXTS, redis_url, keys)
    assert served.error(plain, served.theirs(reference, TEXTS)) <= TOLERANCE
    assert np.abs(np.array(plain) - np.array(vectors)).max() > 0.01
