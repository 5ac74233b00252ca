from __future__ import annotations

import json
from typing import Any

import pytest

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.module_files import read_modules

from .made_files import BERT, OLD, Make

NEW = "sentence_transformers.base.modules"


def test_newer_class_paths(make: Make) -> None:
    pooling = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    files = make(modules=(f"{NEW}.transformer.Transformer", pooling, f"{NEW}.normalize.Normalize"))
    modules = json.loads((files.path / "modules.json").read_text())
    for module, path in zip(modules, ("", "1_Pooling", "2_Normalize"), strict=True):
        module["path"] = path
    (files.path / "modules.json").write_text(json.dumps(modules))
    found = read_modules(files.path)
    assert found.transformer == files.path
    assert found.pooling is not None
    assert found.pooling.file == files.path / "1_Pooling" / "config.json"
    assert [(module.kind, module.folder.name) for module in found.head] == [("Normalize", "2_Normalize")]


def test_a_folder_without_a_list(make: Make) -> None:
    files = make(modules=None)
    found = read_modules(files.path)
    assert (found.listed, found.transformer, found.pooling, found.head) == (False, files.path, None, ())


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("WeightedLayerPooling", "pooled over its layers"),
        ("Router", "several models"),
        ("Asym", "several models"),
        ("LSTM", "made before transformers"),
        ("StaticEmbedding", "static token vectors"),
        ("CLIPModel", "made for images too"),
        ("sentence_transformers.sparse_encoder.models.SpladePooling", "SparseEncoder, or TEI's /embed_sparse"),
        ("sentence_transformers.multi_vector_encoder.modules.MultiVectorMask", "PyLate"),
        ("pylate.models.Dense.Dense", "PyLate"),
        ("Wonder", "not known here"),
        ("custom_st.Pooling", "the authors' own code, which is never run; use a version"),
    ],
)
def test_modules_that_are_not_served_name_what_to_use(make: Make, name: str, instead: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"modules\.json: the module '.*{name}' is .*{instead}"):
        read_modules(make(modules=("Transformer", "Pooling", name)).path)


def test_the_authors_own_code_of_jina(make: Make) -> None:
    files = make(modules=("custom_st.Transformer", "Pooling"), config={**BERT, "lora_adaptations": ["separation"]})
    with pytest.raises(ModelLoadError, match="use jinaai/jina-embeddings-v3-hf"):
        read_modules(files.path)


@pytest.mark.parametrize(
    "modules",
    [
        ("Pooling",),
        ("Pooling", "Transformer"),
        ("Transformer", "Normalize", "Pooling"),
        ("Transformer", "Pooling", "Pooling"),
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Transformer", "Pooling"),
        (),
    ],
)
def test_modules_in_another_order(make: Make, modules: tuple[str, ...]) -> None:
    with pytest.raises(ModelLoadError, match="in this order make no vector"):
        read_modules(make(modules=modules).path)


def test_two_modules_of_one_name(make: Make) -> None:
    modules = [{"name": "0", "type": f"{OLD}.{kind}", "path": kind} for kind in ("Transformer", "Pooling")]
    with pytest.raises(ModelLoadError, match="two modules have the name '0'"):
        read_modules(make(modules=modules).path)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "C:x", "a\\..\\..\\b", "a\nb", "a\0b", 3, None])
def test_a_module_outside_the_folder(make: Make, path: object) -> None:
    with pytest.raises(ModelLoadError, match="does not name a folder beside it"):
        read_modules(make(modules=[{"type": f"{OLD}.Transformer", "path": path}]).path)


@pytest.mark.parametrize("modules", [[3], {"a": 1}, [{"type": f"{OLD}.Transformer"}], 7])
def test_a_list_of_modules_that_is_none(make: Make, modules: Any) -> None:
    with pytest.raises(ModelLoadError, match="not a list of modules"):
        read_modules(make(modules=modules).path)
