"""Tokenizers in older files than tokenizer.json."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tests.parity import vocabularies
from tests.parity.texts import LEARNED_FROM, TEXTS
from tokenizers import Tokenizer

from embedstream.consumer.backbone import quiet
from embedstream.consumer.tokenizer_files import read_tokenizer
from embedstream.shared.errors import ModelLoadError

PLAIN = [text for text in TEXTS if "</s>" not in text and "  " not in text]
"""Without special tokens, which SentencePiece knows nothing of, and spaces that some tokenizers cut off before it."""


def ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Of the card, which must be those that sentence-transformers would see."""
    with quiet(), structlog.testing.capture_logs() as logs:
        tokenizer = Tokenizer.from_str(read_tokenizer(folder).json)
        auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []
    found = [tokenizer.encode(text).ids for text in TEXTS]
    assert found == [auto(text)["input_ids"] for text in TEXTS]
    return [found[TEXTS.index(text)] for text in texts]


def configure(folder: Path, tokenizer_class: str, model_type: str, **fields: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **fields}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def sentencepiece(folder: Path, name: str, kind: str, **options: Any) -> SentencePieceProcessor:
    """A small model of SentencePiece in a file of its own."""
    written = io.BytesIO()
    size = 450 if kind == "bpe" else 150
    SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNED_FROM),
        model_writer=written,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / name).write_bytes(written.getvalue())
    return SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_vocab_txt(tmp_path: Path, do_lower_case: bool) -> None:
    made = vocabularies.bert(do_lower_case=do_lower_case)
    vocabulary = made.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    configure(tmp_path, "BertTokenizer", "bert", do_lower_case=do_lower_case)
    assert ids(tmp_path, TEXTS) == [made(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("make", "tokenizer_class", "model_type"),
    [
        (vocabularies.roberta, "RobertaTokenizer", "roberta"),
        (vocabularies.qwen2_without_end, "Qwen2Tokenizer", "qwen2"),
    ],
)
def test_vocab_json_and_merges(tmp_path: Path, make: Callable[[], Any], tokenizer_class: str, model_type: str) -> None:
    made = make()
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(made.get_vocab()))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    configure(tmp_path, tokenizer_class, model_type)
    assert ids(tmp_path, TEXTS) == [made(text)["input_ids"] for text in TEXTS]


def test_unigrams_of_xlm_roberta(tmp_path: Path) -> None:
    """Its ids are those of SentencePiece plus one, after special tokens in another order."""
    file = sentencepiece(tmp_path, "sentencepiece.bpe.model", "unigram")
    configure(tmp_path, "XLMRobertaTokenizer", "xlm-roberta")
    expected = [[0, *(piece + 1 if piece else 3 for piece in file.encode(text)), 2] for text in PLAIN]
    assert ids(tmp_path, PLAIN) == expected


def test_unigrams_of_t5(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path, "spiece.model", "unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    configure(tmp_path, "T5Tokenizer", "t5")
    assert ids(tmp_path, PLAIN) == [[*file.encode(text), 1] for text in PLAIN]


def test_unigrams_of_deberta(tmp_path: Path) -> None:
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    file = sentencepiece(tmp_path, "spm.model", "unigram", pad_id=0, bos_id=1, eos_id=2, unk_id=3, **pieces)
    configure(tmp_path, "DebertaV2Tokenizer", "deberta-v2")
    assert ids(tmp_path, PLAIN) == [[1, *file.encode(text), 2] for text in PLAIN]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_pairs_of_llama(tmp_path: Path, bos: bool, eos: bool) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    file = sentencepiece(tmp_path, "tokenizer.model", "bpe", **options)
    configure(tmp_path, "LlamaTokenizer", "llama", add_bos_token=bos, add_eos_token=eos)
    assert ids(tmp_path, PLAIN) == [[*[1] * bos, *file.encode(text), *[2] * eos] for text in PLAIN]


@pytest.mark.parametrize(("model_type", "doubtful"), [("llama", False), ("mistral", True)])
def test_a_conversion_that_loses_the_first_space(tmp_path: Path, model_type: str, doubtful: bool) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece(tmp_path, "tokenizer.model", "bpe", **options)
    configure(tmp_path, "LlamaTokenizer", model_type)
    with quiet(), structlog.testing.capture_logs() as logs:
        read_tokenizer(tmp_path)
    doubts = [entry["reason"] for entry in logs if entry["log_level"] == "warning"]
    assert ["otherwise than tokenizer.model does" in doubt for doubt in doubts] == [True] * doubtful


def test_pairs_of_gemma(tmp_path: Path) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    pieces = {"pad_piece": "<pad>", "bos_piece": "<bos>", "eos_piece": "<eos>"}
    numbers = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    file = sentencepiece(tmp_path, "tokenizer.model", "bpe", add_dummy_prefix=False, **options, **pieces, **numbers)
    configure(tmp_path, "GemmaTokenizer", "gemma3_text", add_bos_token=True, add_eos_token=True)
    assert ids(tmp_path, PLAIN) == [[2, *file.encode(text), 1] for text in PLAIN]


def test_a_damaged_model_of_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"no model\nat all")
    configure(tmp_path, "XLMRobertaTokenizer", "xlm-roberta")
    with quiet(), pytest.raises(ModelLoadError, match=r"the tokenizer in .* cannot be loaded") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tokenizer_class", "model_type"),
    [
        ("sentencepiece.bpe.model", "XLMRobertaTokenizer", "xlm-roberta"),  # empty
        ("vocab.txt", "T5Tokenizer", "t5"),
        ("vocab.json", "BertTokenizer", "bert"),
    ],
)
def test_files_that_the_class_does_not_read(tmp_path: Path, name: str, tokenizer_class: str, model_type: str) -> None:
    (tmp_path / name).write_bytes(b"{}" if name.endswith(".json") else b"")
    configure(tmp_path, tokenizer_class, model_type)
    with quiet(), pytest.raises(ModelLoadError, match=r"knows no letters: its files are not those that \w+ reads"):
        read_tokenizer(tmp_path)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    configure(tmp_path, "BertTokenizer", "bert")
    with quiet(), pytest.raises(ModelLoadError, match="has no tokenizer"):
        read_tokenizer(tmp_path)
