from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.models import ModelFiles, locate
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.recipe_files import read_recipe, transformer_folder
from embedstream.shared.settings import PoolingName, Settings

OLD = "sentence_transformers.models"
NEW = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
BERT = {"model_type": "bert", "hidden_size": 32, "vocab_size": 100, "max_position_embeddings": 64}
Make = Callable[..., ModelFiles]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a model's JSON files; None leaves a file out."""

    def write(
        *,
        modules: Any = ("Transformer", "Pooling", "Normalize"),
        config: Any = BERT,
        pooling: Any = {"pooling_mode": "cls"},  # noqa: B006 (never changed)
        others: dict[str, Any] | None = None,
        transformer: str = "",
    ) -> ModelFiles:
        if isinstance(modules, tuple):
            paths = {"Transformer": transformer, "Pooling": "1_Pooling"}
            modules = [
                {"path": paths.get(name, name), "type": name if "." in name else f"{OLD}.{name}"} for name in modules
            ]
        contents = {f"{transformer}/config.json": config, "1_Pooling/config.json": pooling, "modules.json": modules}
        for name, value in {**contents, **(others or {})}.items():
            if value is not None:
                path = tmp_path / name.lstrip("/")
                path.parent.mkdir(exist_ok=True)
                path.write_text(value if isinstance(value, str) else json.dumps(value))
        return ModelFiles(tmp_path, "r")

    return write


def recipe_of(files: ModelFiles, **settings: Any) -> Recipe:
    return read_recipe(files, Settings(**settings))


def test_minilm() -> None:
    assert recipe_of(locate("all-MiniLM-L6-v2")) == Recipe(
        max_length=256,
        pooling=(Pooling.MEAN,),
        normalize=True,
        dimension=384,
        vocab_size=30522,
        pooling_source="modules.json",
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode": "mean"}, (Pooling.MEAN,)),
        ({"pooling_mode": "cls"}, (Pooling.CLS,)),
        ({"pooling_mode": "lasttoken"}, (Pooling.LAST,)),
        ({"pooling_mode": ["cls"]}, (Pooling.CLS,)),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, (Pooling.CLS,)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, (Pooling.CLS,)),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, (Pooling.MEAN,)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, (Pooling.LAST,)),
        ({"word_embedding_dimension": 32}, (Pooling.MEAN,)),
    ],
)
def test_pooling_modes(make: Make, config: dict[str, Any], expected: tuple[Pooling, ...]) -> None:
    recipe = recipe_of(make(pooling=config))
    assert (recipe.pooling, recipe.pooling_source) == (expected, "modules.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "max"}, "'max' is not supported yet"),
        ({"pooling_mode": "weightedmean"}, "'weightedmean' is not supported yet"),
        ({"pooling_mode_max_tokens": True}, "'max_tokens' is not supported yet"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "'mean_sqrt_len_tokens' is not supported yet"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token, mean_tokens"),
        ({"pooling_mode": ["cls", "mean"]}, "several pooling modes at once"),
        ({"pooling_mode": 3}, "not the name of a mode"),
        ({"pooling_mode": []}, "not the name of a mode"),
        ([], "holds no JSON object"),
        (None, "1_Pooling/config.json is missing"),
    ],
)
def test_pooling_that_is_not_understood(make: Make, config: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        recipe_of(make(pooling=config))


def test_newer_class_paths(make: Make) -> None:
    base = "sentence_transformers.base.modules"
    files = make(modules=(f"{base}.transformer.Transformer", NEW, f"{base}.normalize.Normalize"))
    modules = json.loads((files.path / "modules.json").read_text())
    for module, path in zip(modules, ("", "1_Pooling", "2_Normalize"), strict=True):
        module["path"] = path
    (files.path / "modules.json").write_text(json.dumps(modules))
    recipe = recipe_of(files)
    assert (recipe.pooling, recipe.normalize) == ((Pooling.CLS,), True)


def test_without_normalize_vectors_stay_raw(make: Make) -> None:
    assert recipe_of(make(modules=("Transformer", "Pooling"))).normalize is False


@pytest.mark.parametrize("name", ["Dense", "LayerNorm", "WeightedLayerPooling", "Router"])
def test_other_modules_are_named(make: Make, name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"{name}' is not supported yet"):
        recipe_of(make(modules=("Transformer", "Pooling", name)), pooling=PoolingName.MEAN)


@pytest.mark.parametrize(
    "modules", [("Pooling",), ("Pooling", "Transformer"), ("Transformer", "Normalize", "Pooling"), ()]
)
def test_modules_in_another_order(make: Make, modules: tuple[str, ...]) -> None:
    with pytest.raises(ModelLoadError, match="in this order are not supported yet"):
        recipe_of(make(modules=modules))


def test_the_authors_own_code(make: Make) -> None:
    modules = [{"type": "custom_st.Transformer", "path": ""}, {"type": f"{OLD}.Pooling", "path": "1_Pooling"}]
    with pytest.raises(ModelLoadError, match=r"'custom_st\.Transformer' is not supported yet"):
        recipe_of(make(modules=modules))


def test_a_module_twice(make: Make) -> None:
    with pytest.raises(ModelLoadError, match="Pooling' is not supported yet"):
        recipe_of(make(modules=("Transformer", "Pooling", "Pooling")))


def test_no_pooling_module(make: Make) -> None:
    files = make(modules=("Transformer", "Normalize"))
    with pytest.raises(ModelLoadError, match="no Pooling module; set --pooling"):
        recipe_of(files)
    assert recipe_of(files, pooling=PoolingName.MEAN).pooling == (Pooling.MEAN,)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", 3])
def test_a_module_outside_the_folder(make: Make, path: object) -> None:
    with pytest.raises(ModelLoadError, match="does not name a folder beside it"):
        recipe_of(make(modules=[{"type": f"{OLD}.Transformer", "path": path}]))


@pytest.mark.parametrize("modules", [[3], {"a": 1}, [{"type": f"{OLD}.Transformer"}], 7])
def test_a_list_of_modules_that_is_none(make: Make, modules: Any) -> None:
    with pytest.raises(ModelLoadError, match="not a list of modules"):
        recipe_of(make(modules=modules))


def test_the_operator_overrides_the_pooling(make: Make) -> None:
    recipe = recipe_of(make(pooling={"pooling_mode": "max"}), pooling=PoolingName.ALL)
    assert (recipe.pooling, recipe.pooling_source, recipe.normalize) == ((Pooling.ALL,), "override", True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, (Pooling.CLS,)),
        ({"model_type": "qwen2"}, (Pooling.LAST,)),
        ({"model_type": "new-kind", "architectures": ["NewForCausalLM"]}, (Pooling.LAST,)),
        ({"model_type": "new-kind", "architectures": ["NewForMaskedLM"]}, (Pooling.CLS,)),
    ],
)
def test_the_architectures_default_with_a_warning(
    make: Make, config: dict[str, Any], expected: tuple[Pooling, ...]
) -> None:
    with structlog.testing.capture_logs() as logs:
        recipe = recipe_of(make(modules=None, config={**BERT, **config}))
    assert (recipe.pooling, recipe.pooling_source, recipe.normalize) == (expected, "architecture default", True)
    assert [(line["event"], line["log_level"]) for line in logs] == [("model.pooling_assumed", "warning")]


def test_no_default_for_an_unknown_architecture(make: Make) -> None:
    files = make(modules=None, config={**BERT, "model_type": "new-kind"})
    with pytest.raises(ModelLoadError, match="'new-kind' is pooled; set --pooling"):
        recipe_of(files)
    assert recipe_of(files, pooling=PoolingName.LAST).pooling == (Pooling.LAST,)


OWN, TOKENIZER = "sentence_bert_config.json", "tokenizer_config.json"
QWEN = {**BERT, "model_type": "qwen2"}
ROBERTA = {**BERT, "model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "others", "expected"),
    [
        (BERT, {OWN: {"max_seq_length": 48}, TOKENIZER: {"model_max_length": 32}}, 48),
        (BERT, {"sentence_xlnet_config.json": {"max_seq_length": 40}}, 40),
        (BERT, {OWN: {"max_seq_length": 48}, "sentence_roberta_config.json": {"max_seq_length": 40}}, 48),
        (BERT, {OWN: {"max_seq_length": None}, TOKENIZER: {"model_max_length": 32}}, 32),
        (BERT, {OWN: {"max_seq_length": 512}}, 64),
        (QWEN, {OWN: {"max_seq_length": 512}}, 512),
        (BERT, {TOKENIZER: {"model_max_length": 512}}, 64),
        (BERT, {TOKENIZER: {"model_max_length": 10**30}}, 64),
        (BERT, {TOKENIZER: {"model_max_length": 1e30}}, 64),
        (BERT, {}, 64),
        (ROBERTA, {}, 512),
        (ROBERTA, {OWN: {"max_seq_length": 514}}, 512),
        ({**ROBERTA, "pad_token_id": None}, {}, 512),
        ({**ROBERTA, "model_type": "roberta", "pad_token_id": 3}, {}, 510),
        ({**BERT, "model_type": "xlnet", "max_position_embeddings": -1}, {TOKENIZER: {"model_max_length": 99}}, 99),
        ({"model_type": "m", "text_config": BERT}, {}, 64),
    ],
)
def test_the_longest_input(make: Make, config: Any, others: dict[str, Any], expected: int) -> None:
    assert recipe_of(make(config=config, others=others)).max_length == expected


def test_the_operator_may_only_lower_it(make: Make) -> None:
    files = make()
    assert recipe_of(files, max_model_len=64).max_length == 64
    assert recipe_of(files, max_model_len=10).max_length == 10
    with pytest.raises(ModelLoadError, match="--max-model-len 65 is more than the 64 tokens"):
        recipe_of(files, max_model_len=65)


def test_no_limit_in_the_files(make: Make) -> None:
    config = {"model_type": "t5", "d_model": 32, "vocab_size": 100}
    files = make(config=config, others={TOKENIZER: {"model_max_length": 10**30}})
    with pytest.raises(ModelLoadError, match="set --max-model-len"):
        recipe_of(files)
    assert recipe_of(files, max_model_len=99).max_length == 99


def test_old_models_keep_the_transformer_in_a_folder(make: Make) -> None:
    files = make(transformer="0_Transformer", others={f"0_Transformer/{OWN}": {"max_seq_length": 48}})
    assert transformer_folder(files.path) == files.path / "0_Transformer"
    assert recipe_of(files).max_length == 48


def test_lower_casing(make: Make) -> None:
    assert recipe_of(make()).do_lower_case is False
    assert recipe_of(make(others={OWN: {"do_lower_case": True}})).do_lower_case is True


@pytest.mark.parametrize(("side", "expected"), [("left", TruncationSide.LEFT), ("right", TruncationSide.RIGHT)])
def test_truncation_side(make: Make, side: str, expected: TruncationSide) -> None:
    assert recipe_of(make(others={TOKENIZER: {"truncation_side": side}})).truncation_side is expected


@pytest.mark.parametrize(
    ("fields", "setting", "expected"),
    [
        ({}, None, ()),
        ({"is_matryoshka": False}, None, ()),
        ({"is_matryoshka": True}, None, None),
        ({"matryoshka_dimensions": [8, 16]}, None, (8, 16)),
        ({"is_matryoshka": True, "matryoshka_dimensions": [8]}, None, (8,)),
        ({"matryoshka_dimensions": [8, 16]}, "any", None),
        ({"matryoshka_dimensions": [8, 16]}, "off", ()),
        ({}, "8, 32", (8, 32)),
    ],
)
def test_matryoshka_sizes(
    make: Make, fields: dict[str, Any], setting: str | None, expected: tuple[int, ...] | None
) -> None:
    assert recipe_of(make(config={**BERT, **fields}), matryoshka_dims=setting).matryoshka_dims == expected


def test_matryoshka_sizes_that_cannot_be(make: Make) -> None:
    with pytest.raises(ModelLoadError, match="only 32 components"):
        recipe_of(make(), matryoshka_dims="8,33")
    with pytest.raises(ModelLoadError, match="not a list of sizes"):
        recipe_of(make(config={**BERT, "matryoshka_dimensions": ["8"]}))


@pytest.mark.parametrize(
    "own",
    [
        {"transformer_task": "fill-mask"},
        {"module_output_name": "sentence_embedding"},
        {"config_args": {"is_causal": False}},
        {"tokenizer_args": {"padding_side": "left"}},
        {"model_args": 3},
        {"query_expansion": {"length": 32}},
    ],
)
def test_settings_of_the_transformer_module_that_are_not_understood(make: Make, own: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=f"{next(iter(own))} .* is not supported yet"):
        recipe_of(make(others={OWN: own}))


def test_settings_of_the_transformer_module_that_change_no_vector(make: Make) -> None:
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    own = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": text},
        "module_output_name": "token_embeddings",
        "unpad_inputs": None,
        "model_args": {"attn_implementation": "sdpa", "torch_dtype": "bfloat16"},
    }
    assert recipe_of(make(others={OWN: own})).max_length == 64


@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json", OWN, TOKENIZER])
@pytest.mark.parametrize("content", ["{", "\udcff", "3"])
def test_damaged_files_are_named(make: Make, name: str, content: str) -> None:
    files = make()
    (files.path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelLoadError, match=name):
        recipe_of(files)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json is missing"),
        ({**BERT, "vocab_size": None}, "has none of vocab_size"),
        ({**BERT, "vocab_size": "many"}, "vocab_size is 'many', not a number"),
        ({**BERT, "hidden_size": True}, "hidden_size is True, not a number"),
        ({"model_type": "bert", "vocab_size": 100, "max_position_embeddings": 9}, "has none of hidden_size"),
        ('{"vocab_size": Infinity, "hidden_size": 3, "n_positions": 9}', "vocab_size is inf"),
    ],
)
def test_a_configuration_that_says_too_little(make: Make, config: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        recipe_of(make(config=config))


def test_a_truncation_side_that_is_none(make: Make) -> None:
    with pytest.raises(ModelLoadError, match="neither left nor right"):
        recipe_of(make(others={TOKENIZER: {"truncation_side": "middle"}}))
