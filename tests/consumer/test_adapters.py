"""Task adapters, written by peft: each vector is that of sentence-transformers with the adapter, one text at a time."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import structlog
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModel, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from embedstream.consumer import adapters
from embedstream.consumer.direct import Direct
from embedstream.consumer.embedder import Embedder
from embedstream.consumer.examination import State, examine
from embedstream.consumer.model import Model
from embedstream.consumer.reference import compare
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.jobs import Job, text_lengths
from embedstream.shared.lanes import LANES
from embedstream.shared.models import locate
from embedstream.shared.results import Status
from embedstream.shared.settings import Dtype, Settings

from .fleet import Fleet
from .made import answers, consumer, send

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports, none of which is ours
    from sentence_transformers import SentenceTransformer

TEXTS = ("the queue", "a", "x" * 30, "queue the queue, the queue: the", "1 2 3", "", "z " * 20)
FOLDERS = {"retrieval.query": "retrieval_query", "separation": "separation", "text-matching": "text_matching"}
LINEAR = {"bert": ["query", "value", "dense"], "jina": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]}
EVERY = ("", *FOLDERS)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Vectors = NDArray[np.float32]


def settings(folder: Path, **others: Any) -> Settings:
    return Settings(model=str(folder), served_model_name=("m",), dtype=Dtype.FLOAT32, device="cpu", threads=1, **others)


def write_adapters(folder: Path, family: str) -> None:
    """Three adapters of different kinds, in folders of a model's."""
    words = "embeddings.word_embeddings"
    kinds: dict[str, dict[str, Any]] = {
        "retrieval_query": {"r": 4, "target_modules": [*LINEAR[family], words]},
        "separation": {"r": 3, "target_modules": LINEAR[family][:1], "use_rslora": True},
        "text_matching": {"r": 2, "target_modules": LINEAR[family], "modules_to_save": ["embeddings.LayerNorm"]},
    }
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed + 1)
        config = peft.LoraConfig(lora_alpha=8, lora_dropout=0.5, init_lora_weights=False, **kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what peft looks for on a model, to train it
            module: Any = peft.get_peft_model(AutoModel.from_pretrained(folder), config)
        with torch.no_grad():
            for tensor_name, tensor in module.named_parameters():
                if "modules_to_save" in tensor_name:
                    tensor += torch.rand_like(tensor)  # as a training would have changed it
        module.save_pretrained(folder / name)


@pytest.fixture
def make(tiny_bert: Callable[..., Path]) -> Callable[[str], Path]:
    """Makes a random model of a family with three adapters."""

    def with_adapters(family: str) -> Path:
        folder = tiny_bert(max_length=40)
        if family == "jina":
            tokens = json.loads((folder / "config.json").read_text())["vocab_size"]
            torch.manual_seed(0)
            config = JinaEmbeddingsV3Config(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                vocab_size=tokens,
                max_position_embeddings=64,
                initializer_range=0.5,
                pad_token_id=0,
            )
            JinaEmbeddingsV3Model(config).save_pretrained(folder)
        write_adapters(folder, family)
        return folder

    return with_adapters


def reference(folder: Path, adapter: str) -> Vectors:
    """What sentence-transformers makes of `TEXTS`."""
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    if adapter:
        model.load_adapter(str(folder / FOLDERS[adapter]), adapter_name="only")
    return np.stack([model.encode(text, show_progress_bar=False) for text in TEXTS])


def error(ours: Sequence[Any], theirs: Vectors) -> float:
    """The largest difference, to 1 or the largest number there is."""
    return float(np.abs(np.stack(ours) - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("family", ["bert", "jina"])
def test_each_adapter_is_that_of_sentence_transformers(make: Callable[[str], Path], family: str) -> None:
    folder = make(family)
    expected = {name: reference(folder, name) for name in EVERY}
    direct = Direct(Model.load(settings(folder)), 4096)
    for _ in range(2):  # an adapter leaves no trace
        for name in EVERY:
            assert error(direct.embed(TEXTS, adapter=name).vectors, expected[name]) <= 1e-5
    far = [error(list(expected[one]), expected[other]) for one in EVERY for other in EVERY if one != other]
    assert min(far) > 0.01


def test_adapters_are_told_by_the_names_of_their_tasks(make: Callable[[str], Path]) -> None:
    folder = make("jina")
    bare = Model.load(settings(folder))
    assert (bare.recipe.adapters, bare.recipe.default_adapter) == (tuple(FOLDERS), "")
    for asked in ("retrieval.query", "retrieval_query"):
        model = Model.load(settings(folder, default_task=asked))
        assert model.recipe.default_adapter == "retrieval.query"
        assert model.card.fingerprint != bare.card.fingerprint
    assert error(Direct(model, 4096).embed(TEXTS).vectors, reference(folder, "retrieval.query")) <= 1e-5
    with pytest.raises(ModelLoadError, match=r"^--default-task x: the model has the adapters retrieval.query, sep"):
        Model.load(settings(folder, default_task="x"))


def test_a_model_without_adapters_has_no_default_task(tiny_bert: Callable[..., Path]) -> None:
    with pytest.raises(ModelLoadError, match=r"^--default-task x: the model has no adapters$"):
        Model.load(settings(tiny_bert(), default_task="x"))


def test_adapters_share_the_weights_of_the_model(make: Callable[[str], Path]) -> None:
    model = Model.load(settings(make("jina")))
    of_model = {id(tensor) for tensor in model._module.parameters()}
    for name in FOLDERS:
        names = [name for name, tensor in model._modules[name].named_parameters() if id(tensor) not in of_model]
        assert names
        assert all("lora" in name or "modules_to_save" in name for name in names)


def test_other_weights_of_an_adapter_are_another_revision(make: Callable[[str], Path]) -> None:
    folder = make("jina")
    before = locate(str(folder)).revision
    shutil.copy(folder / "retrieval_query" / WEIGHTS, folder / "separation" / WEIGHTS)
    assert locate(str(folder)).revision != before


async def test_jobs_of_several_adapters_in_flight(make: Callable[[str], Path], fleet: Fleet) -> None:
    folder = make("jina")
    model = Model.load(settings(folder))
    asked = [(name, lane) for _ in range(3) for name in (*EVERY, "none") for lane in LANES]
    redis, keys = fleet.redis, fleet.keys
    for number, (name, lane) in enumerate(asked):  # all wait before anything is computed
        request, lengths = number.to_bytes(16, "little"), text_lengths(TEXTS)
        await send(redis, keys, Job(request, 0, 1, 0, 60_000, lengths, texts=TEXTS, adapter=name), lane)
    async with consumer(fleet.url, keys, model.card.tokenizer, Embedder(model), model=model.card):
        found = await answers(redis, keys, len(asked))
    expected = {name: reference(folder, name) for name in EVERY}
    for number, (name, _) in enumerate(asked):
        if name in expected:
            assert error(list(found[number].vectors), expected[name]) <= 1e-5
        else:
            assert set(found[number].rows["status"]) == {Status.INVALID_INPUT}
            assert found[number].messages == (
                "The model has no adapter `none`; it has `retrieval.query`, `separation`, `text-matching`.",
            )


def test_the_doctor_compares_each_adapter(make: Callable[[str], Path]) -> None:
    folder = make("bert")
    own = settings(folder, default_task="separation")
    _, examined = examine(own, lambda _: None)
    shutil.rmtree(folder / "separation")
    shutil.copytree(folder / "text_matching", folder / "separation")  # sentence-transformers reads another one
    states = {check.name: check.state for check in compare(own, examined, lambda _: None)}
    wrong = {name for name, state in states.items() if state is not State.OK}
    assert wrong == {"vectors of tokens", "vectors", "adapter separation", "encode_document"}
    assert {"adapter retrieval.query", "adapter text-matching", "encode_query"} < set(states)


def test_the_doctor_times_what_requests_without_a_choice_get(
    make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings(make("bert"), default_task="separation")
    model = Model.load(own)
    used: set[str] = set()
    forward = model.forward

    def noted(ids: Any, lengths: Any, adapter: str = "") -> Any:
        used.add(adapter)
        return forward(ids, lengths, adapter)

    monkeypatch.setattr(model, "forward", noted)
    monkeypatch.setattr(Model, "load", lambda _: model)
    examine(own, lambda _: None)
    assert used == {"separation"}


def rewrite(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def lack_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop(next(name for name in sorted(tensors) if "lora_B" in name))
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})


def have_another_size(adapter: Path) -> None:
    rewrite(adapter / CONFIG, r=5)


def be_of_another_model(adapter: Path) -> None:
    rewrite(adapter / CONFIG, target_modules=["elsewhere"])


def be_a_pickle(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lack_a_tensor, r"lacks 1 tensors that fit BertModel and its adapter_config.json, such as \S+lora_B\S+$"),
        (
            lambda adapter: rewrite(adapter / CONFIG, use_dora=True),
            r"lacks \d+ .*; it is DoRA, which transformers \S+ ",
        ),
        (have_another_size, r"lacks \d\d tensors that fit BertModel and its adapter_config.json, such as "),
        (be_of_another_model, r"cannot be loaded: Target modules \{'elsewhere'\} not found"),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(b"no"), r"cannot be loaded: "),
        (lambda adapter: rewrite(adapter / CONFIG, peft_type="IA3"), r"is of the type 'IA3'; only LORA is supported$"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    make: Callable[[str], Path], spoil: Callable[[Path], object], says: str
) -> None:
    folder = make("bert")
    spoil(folder / "retrieval_query")
    with pytest.raises(ModelLoadError, match=rf"^the adapter in \S+/retrieval_query {says}") as caught:
        Model.load(settings(folder))
    assert "\n" not in str(caught.value)


def test_an_adapter_without_weights_to_load_is_left_out(
    make: Callable[[str], Path],
) -> None:
    """As e5-mistral has one: part of its weights already, and a pickle."""
    folder = make("bert")
    be_a_pickle(folder / "retrieval_query")
    (folder / "separation" / WEIGHTS).unlink()
    with structlog.testing.capture_logs() as logs:
        model = Model.load(settings(folder))
    assert model.recipe.adapters == ("text-matching",)
    left_out = [line["adapter"] for line in logs if line["event"] == "adapter.left_out"]
    assert left_out == ["retrieval.query", "separation"]
    with pytest.raises(ModelLoadError, match=r"^--default-task separation: the model has the adapters text-matching$"):
        Model.load(settings(folder, default_task="separation"))


def test_two_adapters_of_one_name_are_refused(make: Callable[[str], Path]) -> None:
    folder = make("bert")
    shutil.copytree(folder / "separation", folder / "adapters" / "separation")
    with pytest.raises(ModelLoadError, match=r"^two adapters of \S+ have the name separation: "):
        Model.load(settings(folder))


def test_without_peft_the_reason_names_it(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("bert")
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"\(retrieval.query, separation, text-matching\), and peft is not inst"):
        Model.load(settings(folder))
