"""Tokenizers of a few hundred entries, with the classes and special tokens that the families' own models have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import (
    AlbertTokenizer,
    BertTokenizer,
    CamembertTokenizer,
    DebertaV2Tokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from .texts import LEARNED_FROM

SIZE = 300
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def bert(*, do_lower_case: bool = True) -> PreTrainedTokenizerBase:
    """Word pieces between [CLS] and [SEP]."""
    vocab = _word_pieces(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    return BertTokenizer(vocab=vocab, do_lower_case=do_lower_case)


def mpnet() -> PreTrainedTokenizerBase:
    """Word pieces, with the special tokens of RoBERTa."""
    return MPNetTokenizer(vocab=_word_pieces(("<s>", "<pad>", "</s>", "[UNK]", "<mask>")))


def roberta() -> PreTrainedTokenizerBase:
    """Pairs of bytes, between <s> and </s>."""
    vocab, merges = _byte_pairs(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return RobertaTokenizer(vocab=vocab, merges=merges)


def modernbert() -> PreTrainedTokenizerBase:
    """Pairs of bytes, between [CLS] and [SEP]."""
    special = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    made = _byte_level(special)
    made.post_processor = _around(made, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    names = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    return _fast(made, **dict(zip(names, special, strict=True)))


def eurobert() -> PreTrainedTokenizerBase:
    """Pairs of bytes after Llama 3, between its begin and end tokens."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|mask|>")
    made = _byte_level(special)
    made.post_processor = _around(made, "<|begin_of_text|> $A <|end_of_text|>", *special[:2])
    return _fast(made, bos_token=special[0], eos_token=special[1], pad_token=special[2], mask_token=special[3])


def xlm_roberta() -> PreTrainedTokenizerBase:
    """Unigrams, between <s> and </s>."""
    return XLMRobertaTokenizer(vocab=_unigrams(("<s>", "<pad>", "</s>", "<unk>"), "<unk>", last=("<mask>",)))


def camembert() -> PreTrainedTokenizerBase:
    """Unigrams, with the entries that CamemBERT has and does not use."""
    first = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED")
    return CamembertTokenizer(vocab=_unigrams(first, "<unk>", last=("<s>", "</s>", "<mask>")))


def albert() -> PreTrainedTokenizerBase:
    """Unigrams in lower case without accents, between [CLS] and [SEP]."""
    return AlbertTokenizer(vocab=_unigrams(("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), "<unk>"))


def deberta_v2() -> PreTrainedTokenizerBase:
    """Unigrams of DeBERTa-v2 and v3, between [CLS] and [SEP]."""
    return DebertaV2Tokenizer(vocab=_unigrams(("[PAD]", "[CLS]", "[SEP]", "[UNK]"), "[UNK]", last=("[MASK]",)))


def t5() -> PreTrainedTokenizerBase:
    """Unigrams, before </s>."""
    last = tuple(f"<extra_id_{number}>" for number in range(7, -1, -1))
    return T5Tokenizer(vocab=_unigrams(("<pad>", "</s>", "<unk>"), "<unk>", last=last), extra_ids=8)


def qwen2() -> PreTrainedTokenizerBase:
    """Pairs of bytes, before the end token as Qwen's embedding models have it; padded on the left by their authors."""
    made = qwen2_without_end()
    end = made.eos_token
    made.backend_tokenizer.post_processor = _around(made.backend_tokenizer, f"$A {end}", end)
    return made


def qwen2_without_end() -> PreTrainedTokenizerBase:
    """Pairs of bytes alone, as Qwen's chat models have them."""
    vocab, merges = _byte_pairs(())
    return Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left")


def mistral() -> PreTrainedTokenizerBase:
    """Llama's pairs of letters between <s> and </s>, as in e5-mistral."""
    return _llama(add_eos_token=True, pad_token="<unk>")  # noqa: S106 - a token of a text


def llama() -> PreTrainedTokenizerBase:
    """Llama's pairs of letters after <s>, without an end."""
    return _llama(pad_token="</s>")  # noqa: S106


def gemma() -> PreTrainedTokenizerBase:
    """Gemma's pairs of letters between <bos> and <eos>, as in EmbeddingGemma."""
    vocab, merges = _letter_pairs(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    made = GemmaTokenizer(vocab=vocab, merges=merges, padding_side="left")
    made.backend_tokenizer.post_processor = _around(made.backend_tokenizer, "<bos> $A <eos>", "<bos>", "<eos>")
    return made


def _llama(**options: Any) -> PreTrainedTokenizerBase:
    vocab, merges = _letter_pairs(("<unk>", "<s>", "</s>"))
    return LlamaTokenizer(vocab=vocab, merges=merges, padding_side="left", add_bos_token=True, **options)


def _fast(made: Tokenizer, **options: Any) -> PreTrainedTokenizerBase:
    kind: Any = PreTrainedTokenizerFast  # not annotated
    made_fast: PreTrainedTokenizerBase = kind(tokenizer_object=made, **options)
    return made_fast


def _around(made: Tokenizer, template: str, *special: str) -> TemplateProcessing:
    return TemplateProcessing(single=template, special_tokens=[(token, made.token_to_id(token)) for token in special])


@cache
def _word_pieces(special: Sequence[str]) -> dict[str, int]:
    made: Tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=SIZE, special_tokens=list(special), show_progress=False)
    made.train_from_iterator([text.lower() for text in LEARNED_FROM], trainer)
    return _in_order(made.get_vocab())


@cache
def _byte_pairs(special: Sequence[str]) -> tuple[dict[str, int], Any]:
    made: Tokenizer = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=SIZE + 100,
        special_tokens=list(special),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(LEARNED_FROM, trainer)
    return _in_order(made.get_vocab()), _merges(made)


def _byte_level(special: Sequence[str]) -> Tokenizer:
    vocab, merges = _byte_pairs(tuple(special))
    made: Tokenizer = Tokenizer(BPE(vocab, merges))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.add_special_tokens(list(special))
    return made


@cache
def _letter_pairs(special: Sequence[str]) -> tuple[dict[str, int], Any]:
    """With an entry for each byte, for letters that were not learned."""
    made: Tokenizer = Tokenizer(BPE())
    made.pre_tokenizer = Metaspace()
    trainer = BpeTrainer(vocab_size=SIZE + 300, special_tokens=[*special, *_BYTES], show_progress=False)
    made.train_from_iterator(LEARNED_FROM[:4], trainer)
    return _in_order(made.get_vocab()), _merges(made)


@cache
def _unigrams(first: Sequence[str], unknown: str, last: Sequence[str] = ()) -> list[tuple[str, float]]:
    made: Tokenizer = Tokenizer(Unigram())
    made.pre_tokenizer = Metaspace()
    trainer = UnigramTrainer(vocab_size=SIZE, special_tokens=[unknown], unk_token=unknown, show_progress=False)
    made.train_from_iterator(LEARNED_FROM, trainer)
    learned = [(piece, score) for piece, score in json.loads(made.to_str())["model"]["vocab"] if piece != unknown]
    return [*((token, 0.0) for token in first), *learned, *((token, 0.0) for token in last)]


def _merges(made: Tokenizer) -> Any:
    """As pairs, which the classes take and do not say so."""
    return [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]


def _in_order(vocab: dict[str, int]) -> dict[str, int]:
    return dict(sorted(vocab.items(), key=lambda entry: entry[1]))
