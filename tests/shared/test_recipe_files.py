from __future__ import annotations

from typing import Any

import pytest
import structlog

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.model_manifest import ModelManifest
from embedstream.shared.models import locate
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.recipe_files import read_head, transformer_folder
from embedstream.shared.settings import PoolingName

from .made_files import BERT, OWN, WHOLE, Make, recipe_of

TOKENIZER = "tokenizer_config.json"
QWEN = {**BERT, "model_type": "qwen2"}
ROBERTA = {**BERT, "model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
DENSE = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


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
        ({"pooling_mode": "max"}, (Pooling.MAX,)),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, (Pooling.MEAN_SQRT_LEN,)),
        ({"pooling_mode": "weightedmean"}, (Pooling.WEIGHTED_MEAN,)),
        ({"pooling_mode": ["cls"]}, (Pooling.CLS,)),
        ({"pooling_mode": ["mean", "cls"]}, (Pooling.MEAN, Pooling.CLS)),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, (Pooling.CLS,)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, (Pooling.CLS,)),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, (Pooling.MEAN,)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, (Pooling.LAST,)),
        ({"pooling_mode_max_tokens": True}, (Pooling.MAX,)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, (Pooling.MEAN_SQRT_LEN,)),
        ({"pooling_mode_weightedmean_tokens": True}, (Pooling.WEIGHTED_MEAN,)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (Pooling.CLS, Pooling.MEAN)),
        ({"pooling_mode_new_tokens": False}, (Pooling.MEAN,)),
        ({"word_embedding_dimension": 32}, (Pooling.MEAN,)),
    ],
)
def test_pooling_modes(make: Make, config: dict[str, Any], expected: tuple[Pooling, ...]) -> None:
    recipe = recipe_of(make(pooling=config))
    assert (recipe.pooling, recipe.pooling_source) == (expected, "modules.json")
    assert (recipe.dimension, recipe.size(per_token=True)) == (32 * len(expected), 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "attention"}, "the pooling mode 'attention' is none of"),
        ({"pooling_mode": ["cls", "attention"]}, "the pooling mode 'attention' is none of"),
        ({"pooling_mode_new_tokens": True}, "the pooling mode 'new_tokens' is none of"),
        ({"pooling_mode": 3}, "not the name of a mode"),
        ({"pooling_mode": []}, "not the name of a mode"),
        ({"pooling_mode": None}, "not the name of a mode"),
        ({"include_prompt": "no"}, "include_prompt is 'no', neither true nor false"),
        ([], "holds no JSON object"),
        (None, "1_Pooling/config.json is missing"),
    ],
)
def test_pooling_that_is_not_understood(make: Make, config: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        recipe_of(make(pooling=config))


def test_prompts_may_be_left_out_of_the_pooling(make: Make) -> None:
    assert recipe_of(make()).include_prompt is True
    assert recipe_of(make(pooling={"pooling_mode": "mean", "include_prompt": False})).include_prompt is False


def test_instructor_models_are_known_by_name(make: Make) -> None:
    assert recipe_of(make(), model="hkunlp/instructor-large").include_prompt is False
    files = make()
    ModelManifest("hkunlp/instructor-xl", "1", {}).write(files.path)  # as fetched to a folder
    assert recipe_of(files).include_prompt is False


def test_without_normalize_vectors_stay_raw(make: Make) -> None:
    assert recipe_of(make(modules=("Transformer", "Pooling"))).normalize is False


def test_the_operator_overrides_the_scaling(make: Make) -> None:
    assert recipe_of(make(modules=("Transformer", "Pooling")), normalize=True).normalize is True
    assert recipe_of(make(), normalize=False).normalize is False


def test_no_pooling_module(make: Make) -> None:
    files = make(modules=("Transformer", "Normalize"))
    with pytest.raises(ModelLoadError, match="no Pooling module; set --pooling"):
        recipe_of(files)
    assert recipe_of(files, pooling=PoolingName.MEAN).pooling == (Pooling.MEAN,)


def test_the_operator_overrides_the_pooling(make: Make) -> None:
    recipe = recipe_of(make(pooling={"pooling_mode": "attention"}), pooling=PoolingName.ALL)
    assert (recipe.pooling, recipe.pooling_source, recipe.normalize) == ((Pooling.ALL,), "override", True)


def test_what_follows_the_pooling(make: Make) -> None:
    modules = ("Transformer", "Pooling", "Dropout", "Dense", "Normalize", "Dropout")
    files = make(modules=modules, others={"3_Dense/config.json": DENSE})
    recipe = recipe_of(files)
    assert (recipe.head, recipe.normalize) == ("dense 32>8 tanh", True)
    assert (recipe.dimension, recipe.token_dimension) == (8, 32)
    assert [str(step) for step in read_head(files, recipe)] == ["dense 32>8 tanh"]


def test_a_normalize_that_is_not_the_last(make: Make) -> None:
    modules = ("Transformer", "Pooling", "Normalize", "Dense")
    recipe = recipe_of(make(modules=modules, others={"3_Dense/config.json": DENSE}))
    assert (recipe.head, recipe.normalize) == ("normalize, dense 32>8 tanh", False)


def test_a_step_that_does_not_fit(make: Make) -> None:
    files = make(
        modules=("Transformer", "Pooling", "Dense"),
        pooling={"pooling_mode": ["cls", "mean"]},
        others={"2_Dense/config.json": DENSE},
    )
    with pytest.raises(ModelLoadError, match=r"modules\.json: 2_Dense takes 32 components, but gets 64"):
        recipe_of(files)
    assert recipe_of(files, pooling=PoolingName.CLS).dimension == 8


def test_vectors_of_tokens_are_those_before_the_pooling(make: Make) -> None:
    modules = ("Transformer", "Pooling", "Dense")
    files = make(modules=modules, others={"2_Dense/config.json": DENSE, WHOLE: {"truncate_dim": 4}})
    recipe = recipe_of(files, pooling=PoolingName.ALL)
    assert (recipe.head, recipe.dimension, recipe.per_token) == ("", 32, True)
    assert read_head(files, recipe) == ()


def test_vectors_that_the_authors_cut_are_not_scaled_again(make: Make) -> None:
    files = make(others={WHOLE: {"truncate_dim": 12}})
    recipe = recipe_of(files)
    assert (recipe.dimension, recipe.normalize, recipe.head) == (12, False, "normalize, cut to 12")
    assert len(read_head(files, recipe)) == 2
    assert recipe_of(files, normalize=True).normalize is True


def test_cutting_to_more_than_there_is(make: Make) -> None:
    recipe = recipe_of(make(others={WHOLE: {"truncate_dim": 32}}))
    assert (recipe.dimension, recipe.normalize, recipe.head) == (32, True, "")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, (Pooling.MEAN,)),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, (Pooling.MEAN,)),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, (Pooling.LAST,)),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "is_causal": False}, (Pooling.MEAN,)),
        ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, (Pooling.MEAN,)),
    ],
)
def test_the_architectures_default_with_a_warning(
    make: Make, config: dict[str, Any], expected: tuple[Pooling, ...]
) -> None:
    files = make(modules=None, config={**BERT, **config})
    with structlog.testing.capture_logs() as logs:
        recipe = recipe_of(files)
    assert (recipe.pooling, recipe.pooling_source, recipe.normalize) == (expected, "architecture default", True)
    assert [(line["event"], line["log_level"]) for line in logs] == [("model.pooling_assumed", "warning")]
    assert read_head(files, recipe) == ()


@pytest.mark.parametrize("others", [{TOKENIZER: {"chat_template": "{{ x }}"}}, {"chat_template.jinja": "{{ x }}"}])
def test_a_chat_template_that_sentence_transformers_would_use(make: Make, others: dict[str, Any]) -> None:
    files = make(modules=None, others=others)
    with structlog.testing.capture_logs() as logs:
        recipe_of(files, pooling=PoolingName.LAST)
    assert [(line["event"], line["log_level"]) for line in logs] == [("model.chat_template_not_used", "warning")]


def test_no_default_where_none_is_wanted(make: Make) -> None:
    files = make(modules=None)
    with pytest.raises(ModelLoadError, match=r"--strict-recipe .*\(mean\); say how with --pooling"):
        recipe_of(files, strict_recipe=True)
    recipe = recipe_of(files, strict_recipe=True, pooling=PoolingName.CLS)
    assert (recipe.pooling, recipe.pooling_source) == ((Pooling.CLS,), "override")


@pytest.mark.parametrize("kind", ["new-kind", None, 3, ["bert"]])
def test_no_default_for_an_unknown_architecture(make: Make, kind: object) -> None:
    files = make(modules=None, config={**BERT, "model_type": kind, "architectures": ["NewForMaskedLM"]})
    with pytest.raises(ModelLoadError, match=r"of type .* is pooled; set --pooling"):
        recipe_of(files)
    assert recipe_of(files, pooling=PoolingName.LAST).pooling == (Pooling.LAST,)


@pytest.mark.parametrize(
    ("config", "others", "expected"),
    [
        (BERT, {OWN: {"max_seq_length": 48}, TOKENIZER: {"model_max_length": 32}}, 48),
        (BERT, {OWN: {"max_seq_length": None}, TOKENIZER: {"model_max_length": 32}}, 32),
        (BERT, {OWN: {"max_seq_length": 512}}, 64),
        (QWEN, {OWN: {"max_seq_length": 512}}, 512),
        (BERT, {TOKENIZER: {"model_max_length": 512}}, 64),
        (BERT, {TOKENIZER: {"max_len": 32}}, 32),
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


@pytest.mark.parametrize(
    ("fields", "setting", "expected"),
    [
        ({}, None, ()),
        ({"is_matryoshka": False}, None, ()),
        ({"is_matryoshka": True}, None, None),
        ({"matryoshka_dimensions": [8, 16]}, None, (8, 16)),
        ({"matryoshka_dimensions": [8, 64]}, None, (8,)),
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


@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json", OWN, TOKENIZER, WHOLE])
@pytest.mark.parametrize("content", ["{", "\udcff", "3", "[" * 100_000])
def test_damaged_files_are_named(make: Make, name: str, content: str) -> None:
    files = make()
    (files.path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelLoadError, match=name) as caught:
        recipe_of(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json is missing"),
        ({**BERT, "vocab_size": None}, "has none of vocab_size"),
        ({**BERT, "vocab_size": "many"}, "vocab_size is 'many', not a number"),
        ({**BERT, "hidden_size": True}, "hidden_size is True, not a number"),
        ({**BERT, "hidden_size": 0}, "hidden_size is 0, not a size"),
        ({**BERT, "hidden_size": 10**30}, "hidden_size is 10+, not a size"),
        ({"model_type": "bert", "vocab_size": 100, "max_position_embeddings": 9}, "has none of hidden_size"),
        ('{"vocab_size": Infinity, "hidden_size": 3, "n_positions": 9}', "vocab_size is inf"),
    ],
)
def test_a_configuration_that_says_too_little(make: Make, config: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        recipe_of(make(config=config))


@pytest.mark.parametrize(
    ("architecture", "instead"),
    [
        ("XLMRobertaForSequenceClassification", "TEI's /rerank"),
        ("BertForTokenClassification", "a classifier of tokens"),
        ("BertForQuestionAnswering", "a classifier of tokens"),
        ("HF_ColBERT", "PyLate"),
    ],
)
def test_models_that_have_no_vectors(make: Make, architecture: str, instead: str) -> None:
    files = make(modules=None, config={**BERT, "architectures": [architecture]})
    with pytest.raises(ModelLoadError, match=f"config.json: by its architecture '{architecture}' .*{instead}"):
        recipe_of(files, pooling=PoolingName.CLS)


def test_vectors_of_a_model_that_was_something_else_before(make: Make) -> None:
    """Its modules count: sentence-transformers reads the same weights without their head."""
    files = make(config={**BERT, "architectures": ["BertForSequenceClassification"]})
    assert recipe_of(files).pooling == (Pooling.CLS,)
