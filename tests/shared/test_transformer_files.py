from __future__ import annotations

from typing import Any

import pytest

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.transformer_files import read_transformer_settings

from .made_files import OWN, Make

TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


@pytest.mark.parametrize(
    "own",
    [
        {"module_output_name": "sentence_embedding"},
        {"config_args": {"is_causal": False}},
        {"config_kwargs": {"use_bidirectional_attention": True}},
        {"tokenizer_args": {"add_eos_token": True}},
        {"model_args": 3},
        {"query_expansion": {"length": 32}},
        {"query_length": 32},
        {"document_length": 32},
        {"tokenizer_name_or_path": "another/model"},
        {"modality_config": {"text": TEXT, "message": TEXT}},
        {"modality_config": {"text": {**TEXT, "method_output_name": "pooler_output"}}},
        {"modality_config": {"image": TEXT}},
        {"modality_config": 3},
        {"processing_kwargs": {"text": {"max_length": 16}}},
        {"processing_kwargs": {"common": {"add_special_tokens": False}}},
        {"processing_kwargs": ["text"]},
        {"do_lower_case": "yes"},
        {"max_seq_length": "long"},
        {"something_new": 1},
    ],
)
def test_settings_that_are_not_understood(make: Make, own: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=rf"{OWN}: .*{next(iter(own))}") as caught:
        read_transformer_settings(make(others={OWN: own}).path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "instead"),
    [
        ("sequence-classification", "TEI's /rerank"),
        ("text-generation", "TEI's /rerank"),
        ("fill-mask", "SparseEncoder"),
        ("retrieval", "PyLate"),
        ("wonder", "not known here"),
        (3, "not known here"),
    ],
)
def test_tasks_that_are_not_served(make: Make, task: object, instead: str) -> None:
    with pytest.raises(ModelLoadError, match=f"transformer_task .*{instead}"):
        read_transformer_settings(make(others={OWN: {"transformer_task": task}}).path)


def test_settings_that_change_no_vector(make: Make) -> None:
    own = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": TEXT, "image": {"method": "get_image_features"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": None,
        "query_length": None,
        "model_args": {"attn_implementation": "sdpa", "torch_dtype": "bfloat16", "revision": "x"},
        "tokenizer_args": {"padding_side": "left", "local_files_only": True},
        "processing_kwargs": {"text": {}, "image": {"do_resize": False}},
    }
    found = read_transformer_settings(make(others={OWN: own}).path)
    assert (found.max_length, found.do_lower_case) == (None, False)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"sentence_xlnet_config.json": {"max_seq_length": 40}}, 40),
        ({OWN: {"max_seq_length": 48}, "sentence_roberta_config.json": {"max_seq_length": 40}}, 48),
        ({OWN: {}, "sentence_xlm-roberta_config.json": {"max_seq_length": 40}}, 40),
        ({OWN: {"max_seq_length": 48, "tokenizer_args": {"model_max_length": 40}}}, 40),
        ({}, None),
    ],
)
def test_the_longest_sequence(make: Make, others: dict[str, Any], expected: int | None) -> None:
    assert read_transformer_settings(make(others=others).path).max_length == expected


def test_an_adapter_over_another_model(make: Make) -> None:
    with pytest.raises(ModelLoadError, match=r"adapter_config\.json: .* merge_and_unload"):
        read_transformer_settings(make(others={"adapter_config.json": {}}).path)
