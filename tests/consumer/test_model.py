from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from embedstream.consumer import backbone, loading
from embedstream.consumer.device import choose_device
from embedstream.consumer.model import Model
from embedstream.consumer.pooling import cut_and_normalize, pool
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.models import locate
from embedstream.shared.recipe import Pooling
from embedstream.shared.recipe_files import read_recipe
from embedstream.shared.settings import Dtype, PoolingName, Settings
from embedstream.shared.tokenization import finished

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports, none of which is ours
    from sentence_transformers import SentenceTransformer

TEXTS = [
    "How do I renew my passport?",
    "",
    "passport renewal procedure",
    "   spaces\tand\nlines   ",
    "Grüße aus Zürich, naïve façade, ﬁn",
    "東京タワーは東京都港区にある",
    "مرحبا بالعالم",
    "🙂🙃 emoji 👩‍👩‍👧",
    "the end. [SEP] of <s> something </s>",
    "A",
    "queue " * 400,
    "x" * 300,
]

MakeModel = Callable[..., Path]


def settings(model: Path | str, **others: Any) -> Settings:
    return Settings(**{"model": str(model), "dtype": Dtype.FLOAT32, "device": "cpu", "threads": 1, **others})


def embed(model: Model, texts: Sequence[str]) -> NDArray[np.float32]:
    tokens = model.tokenizer.encode(texts, truncate_to=model.recipe.max_length)
    vectors = pool(model.recipe.pooling, model.forward(tokens.ids, tokens.lengths), as_tensor(tokens.lengths))
    array: NDArray[np.float32] = cut_and_normalize(vectors, None, model.recipe.normalize).numpy()
    return array


def as_tensor(lengths: NDArray[np.integer]) -> torch.Tensor:
    return torch.from_numpy(lengths.astype(np.int64))


def reference(path: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    vectors: NDArray[np.float32] = model.encode(list(texts), show_progress_bar=False, batch_size=4)
    return vectors


def cosines(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    one, two = ours.astype(np.float64), theirs.astype(np.float64)
    products: NDArray[np.float64] = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    return products


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_minilm_equals_sentence_transformers(minilm: Model) -> None:
    ours, theirs = embed(minilm, TEXTS), reference(locate("all-MiniLM-L6-v2").path, TEXTS)
    assert ours.dtype == np.float32
    assert cosines(ours, theirs).min() >= 0.999999
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_minilm_announces_its_recipe(minilm: Model) -> None:
    recipe = minilm.recipe
    assert (recipe.max_length, recipe.pooling, recipe.normalize) == (256, (Pooling.MEAN,), True)
    assert (recipe.dimension, recipe.vocab_size, recipe.matryoshka_dims) == (384, 30522, ())
    assert minilm.card.model == "all-MiniLM-L6-v2"
    assert (minilm.dtype, str(minilm.device)) == ("float32", "cpu")
    card = minilm.card
    published = replace(card, recipe=replace(recipe, pooling_source=""))  # that is for people
    assert ModelCard.decode(card.encode(), card.fingerprint, "all-MiniLM-L6-v2") == published


def test_a_vector_does_not_depend_on_its_neighbours(minilm: Model) -> None:
    together = embed(minilm, TEXTS)
    alone = np.concatenate([embed(minilm, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("normalize", [True, False])
def test_tiny_bert_equals_sentence_transformers(tiny_bert: MakeModel, pooling: str, normalize: bool) -> None:
    path = tiny_bert(pooling, normalize=normalize)
    np.testing.assert_allclose(embed(Model.load(settings(path)), TEXTS), reference(path, TEXTS), atol=2e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
def test_tiny_decoder_equals_sentence_transformers(tiny_decoder: MakeModel, pooling: str) -> None:
    path = tiny_decoder(pooling)
    np.testing.assert_allclose(embed(Model.load(settings(path)), TEXTS), reference(path, TEXTS), atol=2e-5)


def test_what_sentence_transformers_saves_again_gives_the_same_vectors(tiny_bert: MakeModel, tmp_path: Path) -> None:
    path, again = tiny_bert("cls"), tmp_path / "again"
    SentenceTransformer(str(path), device="cpu", local_files_only=True).save_pretrained(str(again))
    np.testing.assert_allclose(embed(Model.load(settings(again)), TEXTS), embed(Model.load(settings(path)), TEXTS))


def test_all_gives_each_tokens_hidden_state(tiny_bert: MakeModel) -> None:
    model = Model.load(settings(tiny_bert(), pooling=PoolingName.ALL))
    tokens = model.tokenizer.encode(["queue", "the queue"])
    hidden = model.forward(tokens.ids, tokens.lengths)
    rows = pool(model.recipe.pooling, hidden, as_tensor(tokens.lengths))
    assert rows.shape == (3 + 4, 32)
    torch.testing.assert_close(rows, hidden)


def test_forward_takes_the_ids_of_a_job(tiny_bert: MakeModel) -> None:
    model = Model.load(settings(tiny_bert()))
    ids, lengths = np.array([2, 7, 3, 2, 8, 9, 3], "<u2"), np.array([3, 4], "<u4")
    hidden = model.forward(ids, lengths)
    assert hidden.shape == (7, 32)
    torch.testing.assert_close(hidden[:3], model.forward(ids[:3], lengths[:1]))
    torch.testing.assert_close(hidden[3:], model.forward(ids[3:], lengths[1:]))


def test_bfloat16_stays_close(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    model = Model.load(settings(path, dtype=Dtype.BFLOAT16))
    assert model.dtype == "bfloat16"
    assert cosines(embed(model, TEXTS), embed(Model.load(settings(path)), TEXTS)).min() > 0.99


def test_the_fingerprint_follows_weights_and_overrides(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    first = Model.load(settings(path)).card
    assert Model.load(settings(path)).card.fingerprint == first.fingerprint
    assert Model.load(settings(path, max_model_len=40)).card.fingerprint != first.fingerprint
    weights = load_file(path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= 2
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert Model.load(settings(path)).card.fingerprint != first.fingerprint


def test_the_files_own_tokenizer_json_is_the_card(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    own = (path / "tokenizer.json").read_text()
    assert Model.load(settings(path)).card.tokenizer == finished(own, do_lower_case=False)


def test_a_slow_tokenizer_is_converted(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    expected = embed(Model.load(settings(path)), TEXTS)
    (path / "tokenizer.json").unlink()
    (path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    rewrite(path / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=True)
    np.testing.assert_allclose(embed(Model.load(settings(path)), TEXTS), expected, atol=1e-6)


def test_tokenizer_config_overrules_tokenizer_json_as_in_transformers(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    rewrite(path / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=False)
    np.testing.assert_allclose(
        embed(Model.load(settings(path)), ["The QUEUE"]), reference(path, ["The QUEUE"]), atol=1e-5
    )


def test_a_model_without_a_chat_template_has_none(minilm: Model, tiny_bert: MakeModel) -> None:
    assert minilm.card.chat is None
    assert Model.load(settings(tiny_bert())).card.chat is None


def test_chat_templates_are_found_where_transformers_looks(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    without = Model.load(settings(path)).card.fingerprint
    rewrite(path / "tokenizer_config.json", chat_template="one")
    card = Model.load(settings(path)).card
    assert card.chat is not None
    assert card.chat.templates == {"default": "one"}
    assert card.chat.special_tokens["cls_token"] == "[CLS]"  # noqa: S105  # no password
    assert card.fingerprint != without
    named = [{"name": "default", "template": "two"}, {"name": "rag", "template": "three"}]
    rewrite(path / "tokenizer_config.json", chat_template=named)
    assert chat_templates(path) == {"default": "two", "rag": "three"}
    (path / "chat_template.jinja").write_text("four é")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("five")
    assert chat_templates(path) == {"default": "four é", "tools": "five"}


def test_the_operator_may_choose_another_chat_template(tiny_bert: MakeModel, tmp_path: Path) -> None:
    path, chosen = tiny_bert(), tmp_path / "chosen.jinja"
    chosen.write_text("chosen")
    assert chat_templates(path, chat_template=chosen) == {"default": "chosen"}
    rewrite(path / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "three"}])
    assert chat_templates(path, chat_template=chosen) == {"default": "chosen", "rag": "three"}
    with pytest.raises(ModelLoadError, match=r"--chat-template .*missing\.jinja cannot be read"):
        Model.load(settings(path, chat_template=tmp_path / "missing.jinja"))


def chat_templates(path: Path, **others: Any) -> dict[str, str]:
    chat = Model.load(settings(path, **others)).card.chat
    assert chat is not None
    return chat.templates


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _truncated_weights(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _a_tensor_missing(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def _not_numbers(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def _other_shape(path: Path) -> None:
    rewrite(path / "config.json", intermediate_size=128)


def _other_names(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, path / "model.safetensors", {"format": "pt"})


def _a_shard_missing(path: Path) -> None:
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"embeddings.LayerNorm.bias": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _own_code(path: Path) -> None:
    rewrite(path / "config.json", model_type="new", auto_map={"AutoConfig": "c.New", "AutoModel": "modeling.NewModel"})


def _own_code_for_a_known_type(path: Path) -> None:
    _a_tensor_missing(path)
    rewrite(path / "config.json", auto_map={"AutoModel": "modeling.NewModel"})


def _unknown_architecture(path: Path) -> None:
    rewrite(path / "config.json", model_type="no_such_model")


def _damaged_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def _encoder_decoder(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "bart", "d_model": 32, "vocab_size": 100}))


def _larger_tokenizer(path: Path) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["surplus"] = 5000
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def _damaged_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, "model.safetensors is missing"),
        (_pickle, "pytorch_model.bin, a pickle"),
        (_truncated_weights, "cannot be loaded: its weights are damaged or not all there"),
        (_a_tensor_missing, "lack 1 tensors of BertModel, such as encoder.layer.1.output.dense.weight"),
        (_not_numbers, "in float32 gave values that are not numbers: the weights are damaged$"),
        (
            _other_shape,
            "config.json: encoder.layer.0.intermediate.dense.bias is 64 there, and 128 by the configuration; 6 tensors",
        ),
        (_other_names, "such as embeddings.LayerNorm.bias; it has others, such as other.embeddings.LayerNorm.bias"),
        (_a_shard_missing, "cannot be loaded"),
        (_unknown_architecture, "knows no models of type 'no_such_model'"),
        (_own_code, "knows no models of type 'new'; its own code, modeling.NewModel, is never run"),
        (_own_code_for_a_known_type, "encoder.layer.1.output.dense.weight; its own code, modeling.NewModel, is never"),
        (_damaged_config, "config.json is damaged"),
        (_encoder_decoder, "encoder-decoder models of type bart are not supported"),
        (_larger_tokenizer, "ids up to 5000, the model has embeddings for 0 to 87"),
        (_damaged_tokenizer, "tokenizer.json is damaged"),
    ],
)
def test_a_model_that_cannot_be_served_says_why(
    tiny_bert: MakeModel, damage: Callable[[Path], None], message: str
) -> None:
    path = tiny_bert()
    damage(path)
    with pytest.raises(ModelLoadError, match=message.replace(".", r"\.")) as caught:
        Model.load(settings(path))
    assert "\n" not in str(caught.value)


def test_a_known_type_with_code_of_its_own_is_computed_by_transformers(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    expected = embed(Model.load(settings(path)), TEXTS)
    rewrite(path / "config.json", auto_map={"AutoModel": "modeling.NewModel"})
    with structlog.testing.capture_logs() as logs:
        np.testing.assert_array_equal(embed(Model.load(settings(path)), TEXTS), expected)
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert warning == {
        "event": "model.own_code_left_out", "code": "modeling.NewModel", "used": "BertModel", "log_level": "warning",
    }  # fmt: skip


def test_a_pooler_without_weights_does_no_harm(tiny_bert: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_bert()
    expected = embed(Model.load(settings(path)), TEXTS)
    weights = {name: value for name, value in load_file(path / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(backbone, "_takes_pooling_layer", lambda _: False)  # as of an architecture without the switch
    np.testing.assert_array_equal(embed(Model.load(settings(path)), TEXTS), expected)


def test_vectors_of_another_size_than_the_files_say(tiny_bert: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "read_recipe", lambda *files: replace(read_recipe(*files), dimension=64))
    with pytest.raises(ModelLoadError, match="vectors of 32 components, its files say 64"):
        Model.load(settings(tiny_bert()))


def test_no_room_beside_the_special_tokens(tiny_bert: MakeModel) -> None:
    with pytest.raises(ModelLoadError, match="--max-model-len 2 leaves no room beside the 2 special tokens"):
        Model.load(settings(tiny_bert(), max_model_len=2))


def test_loading_prints_nothing(tiny_bert: MakeModel) -> None:
    """Progress bars and load reports of transformers would drown the log of a server."""
    code = (
        "import sys\n"
        "from embedstream.consumer.model import Model\n"
        "from embedstream.shared.settings import Settings\n"
        "Model.load(Settings(model=sys.argv[1], dtype='float32', device='cpu', threads=1))\n"
    )
    path = tiny_bert()
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"the device '{name}' cannot be used"):
        choose_device(name)
