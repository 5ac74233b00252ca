"""Files that say things in other places than most do: the vectors are those of sentence-transformers all the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from tests.parity import families
from tests.parity.vocabularies import bert
from transformers import XLNetConfig

from embedstream.consumer.direct import Direct
from embedstream.consumer.model import Model
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.settings import Dtype, PoolingName, Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports, none of which is ours
    from sentence_transformers import SentenceTransformer

TEXTS = ("the queue", "a", "x" * 30, "queue the queue, the queue: the", "unqueued", " ".join(map(str, range(60))))
TOKENIZER, CONFIG = "tokenizer_config.json", "config.json"


def settings(folder: Path, **others: Any) -> Settings:
    return Settings(model=str(folder), served_model_name=("m",), dtype=Dtype.FLOAT32, device="cpu", threads=1, **others)


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut_on_the_left_in_the_tokenizer_itself(folder: Path) -> None:
    truncation = {"direction": "Left", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    rewrite(folder / "tokenizer.json", truncation=truncation)


def cut_on_the_right_in_the_settings_alone(folder: Path) -> None:
    cut_on_the_left_in_the_tokenizer_itself(folder)
    rewrite(folder / TOKENIZER, truncation_side="right")


def cut_on_the_left_in_the_settings_alone(folder: Path) -> None:
    rewrite(folder / TOKENIZER, truncation_side="left")


def have_a_special_token_in_the_settings_alone(folder: Path) -> None:
    rewrite(folder / TOKENIZER, additional_special_tokens=["queue"])


def ask_for_bare_tuples(folder: Path) -> None:
    rewrite(folder / CONFIG, return_dict=False)


@pytest.mark.parametrize(
    "change",
    [
        cut_on_the_left_in_the_tokenizer_itself,
        cut_on_the_right_in_the_settings_alone,
        cut_on_the_left_in_the_settings_alone,
        have_a_special_token_in_the_settings_alone,
        ask_for_bare_tuples,
    ],
)
def test_equals_sentence_transformers(tiny_bert: Callable[..., Path], change: Callable[[Path], None]) -> None:
    folder = tiny_bert()
    change(folder)
    model = Model.load(settings(folder))
    ours = np.array(Direct(model, 4096).embed(TEXTS).vectors)
    reference = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    np.testing.assert_allclose(ours, [reference.encode(text, show_progress_bar=False) for text in TEXTS], atol=1e-5)
    left = change in (cut_on_the_left_in_the_tokenizer_itself, cut_on_the_left_in_the_settings_alone)
    assert model.recipe.truncation_side is (TruncationSide.LEFT if left else TruncationSide.RIGHT)


def test_an_end_that_the_tokenizer_does_not_put(tiny_decoder: Callable[..., Path]) -> None:
    """As gte-Qwen2 would be without the end in its tokenizer.json: the last token of a text would be another one."""
    folder = tiny_decoder()
    rewrite(folder / TOKENIZER, add_eos_token=True)
    with structlog.testing.capture_logs() as logs:
        with_end = Model.load(settings(folder)).tokenizer.encode(["a"]).ids
        rewrite(folder / "tokenizer.json", post_processor=None)
        without = Model.load(settings(folder)).tokenizer.encode(["a"]).ids
    assert (len(with_end), len(without)) == (2, 1)
    doubts = [line["reason"] for line in logs if line["event"] == "model.tokenizer_doubtful"]
    assert [doubt.partition(",")[0] for doubt in doubts] == ["tokenizer_config.json says add_eos_token"]


def test_a_truncation_side_that_is_none(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    rewrite(folder / TOKENIZER, truncation_side="middle")
    with pytest.raises(ModelLoadError, match=r"^the tokenizer in \S+ cannot be loaded: .*middle"):
        Model.load(settings(folder))


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        (
            TOKENIZER,
            {"unk_token": "", "tokenizer_class": "BertTokenizer"},
            r"the tokenizer in \S+ cannot be loaded: WordPiece error: Missing \[UNK\]",
        ),
        (TOKENIZER, {"chat_template": 3}, r"the tokenizer in \S+ cannot be loaded: "),
        (CONFIG, {"is_causal": "no"}, r"the first forward pass failed: .*is_causal"),
    ],
)
def test_odd_values_are_refused_in_one_line(
    tiny_bert: Callable[..., Path], file: str, fields: dict[str, Any], says: str
) -> None:
    folder = tiny_bert()
    rewrite(folder / file, **fields)
    with pytest.raises(ModelLoadError, match=f"^{says}") as caught:
        Model.load(settings(folder))
    assert "\n" not in str(caught.value)


def test_special_tokens_that_are_split_are_refused(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert()
    rewrite(folder / TOKENIZER, split_special_tokens=True)
    with pytest.raises(ModelLoadError, match=r"^the tokenizer in \S+ has split_special_tokens set, which is not supp"):
        Model.load(settings(folder))


def test_token_types_that_count_are_refused(tmp_path: Path) -> None:
    tokenizer = bert()
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    families.Family("XLNet", XLNetConfig, bert, sizes).make(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["post_processor"]["single"][-1]["SpecialToken"]["type_id"] = 2  # as XLNet's own marks its last token
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    rewrite(tmp_path / TOKENIZER, tokenizer_class="PreTrainedTokenizerFast", model_max_length=64)
    chosen = settings(tmp_path, pooling=PoolingName.MEAN)
    assert Model.load(chosen).architecture == "XLNetModel"
    rewrite(tmp_path / TOKENIZER, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    with pytest.raises(ModelLoadError, match=r"^XLNetModel computes other vectors with the token types .* \(0, 2\)"):
        Model.load(chosen)
