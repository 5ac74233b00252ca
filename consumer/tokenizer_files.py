"""The model's tokenizer in the JSON form of the `tokenizers` library, and its chat templates, for the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from embedstream.shared.cards import ChatFormat
from embedstream.shared.errors import EmbedstreamError, ModelLoadError
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.json_files import read_object
from embedstream.shared.logs import get_logger
from embedstream.shared.model_files import has_tokenizer

from .backbone import first_line
from .probe_texts import SHORT

log = get_logger()

# Letters that are put together or taken apart, and marks that look like special tokens, tell normalisers apart.
_PROBES = (*SHORT.values(), "A\tB\nC", "Ångström A\u030angstro\u0308m", "<s> [SEP] </s>")
_TIKTOKEN = "tiktoken.model"  # the one file of that ending that is no model of SentencePiece
_LETTERS = "abc xyz 0123456789"
_HOLLOW_IDS = 2  # at most: one for what is unknown, one for a space


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """What the tokenizer files of a model say.

    Args:
        json: the tokenizer in the form of the `tokenizers` library.
        truncation_side: the end that it cuts, RIGHT or LEFT.
        chat: how chat messages become text, of `tokenizer_config.json`, `chat_template.jinja` and the folder
            `additional_chat_templates`; None without a template.
        typed: token ids of a text and their types, where it gives types to those who compute the model.
    """

    json: str
    truncation_side: TruncationSide
    chat: ChatFormat | None
    typed: tuple[list[int], list[int]] | None


def read_tokenizer(folder: Path, chat_template: Path | None = None) -> ModelTokenizer:
    """The tokenizer as transformers reads it: the file itself when that means the same, else converted.

    `tokenizer.json` alone is not always the whole truth: `tokenizer_config.json` may change lower-casing or special
    tokens, and slow tokenizers have no such file. The file is preferred because its text, and so the card's
    fingerprint, does not depend on the version of transformers.

    Args:
        folder: where the model's tokenizer files are.
        chat_template: a file with a Jinja template to use in place of the model's own.

    Raises:
        ModelLoadError: no tokenizer, or one that is damaged or cannot be converted.
    """
    if not has_tokenizer(folder):  # transformers would make an empty one for the architecture
        raise ModelLoadError(f"{folder} has no tokenizer: tokenizer.json is missing")
    file = folder / "tokenizer.json"
    try:
        written = file.read_text(encoding="utf-8") if file.is_file() else None
        plain = Tokenizer.from_str(written) if written is not None else None
    except Exception as error:  # the library has no class of its own for this
        raise ModelLoadError(f"{file} is damaged: {first_line(error)}") from error
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _model_tokenizer(folder, loaded, written, plain, chat_template)
    except EmbedstreamError:
        raise
    except Exception as error:  # whatever its files and libraries raise
        raise ModelLoadError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def _model_tokenizer(
    folder: Path, loaded: Any, written: str | None, plain: Tokenizer | None, chat_template: Path | None
) -> ModelTokenizer:
    backend, name = getattr(loaded, "backend_tokenizer", None), type(loaded).__name__
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError(f"the tokenizer in {folder} ({name}) has no fast form")
    if loaded.split_special_tokens:  # a state of the library, which the JSON does not hold
        raise ModelLoadError(f"the tokenizer in {folder} has split_special_tokens set, which is not supported")
    converted = backend.to_str()
    if _is_hollow(Tokenizer.from_str(converted)):
        raise ModelLoadError(f"the tokenizer in {folder} knows no letters: its files are not those that {name} reads")
    side = TruncationSide.LEFT if loaded.truncation_side == "left" else TruncationSide.RIGHT
    known = (side, _chat_format(loaded, chat_template), _typed(loaded))
    _compare_with_settings(folder, loaded, Tokenizer.from_str(converted))
    if written is not None and plain is not None and _alike(plain, Tokenizer.from_str(converted)):
        return ModelTokenizer(written, *known)
    log.info("model.tokenizer_converted", path=str(folder), tokenizer=name)
    if written is None:
        _compare_with_sentencepiece(folder, Tokenizer.from_str(converted))
    return ModelTokenizer(converted, *known)


def _chat_format(tokenizer: Any, chosen: Path | None) -> ChatFormat | None:
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if chosen is not None:
        try:
            templates = {**templates, "default": chosen.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"--chat-template {chosen} cannot be read: {error}") from error
    return ChatFormat(templates, tokenizer.special_tokens_map) if templates else None


def _typed(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    made = tokenizer(SHORT["sentence"])
    return (made["input_ids"], made["token_type_ids"]) if "token_type_ids" in made else None


def _alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both make the same ids, also of the tokens that only the settings of one may have added."""
    added = {token.content for each in (one, other) for token in each.get_added_tokens_decoder().values()}
    probes = [*_PROBES, *(f"a{token}b {token} c" for token in sorted(added))]
    return _ids(one, probes) == _ids(other, probes)


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def _is_hollow(tokenizer: Tokenizer) -> bool:
    """Whether all letters are one to it: transformers makes such a one where it does not find a vocabulary."""
    tokenizer.no_truncation()
    return len(set(tokenizer.encode(_LETTERS, add_special_tokens=False).ids)) <= _HOLLOW_IDS


def _compare_with_settings(folder: Path, loaded: Any, tokenizer: Tokenizer) -> None:
    """Warn when an end is asked for that the tokenizer does not put: transformers 5 heeds `tokenizer.json` alone."""
    settings = read_object(folder / "tokenizer_config.json", missing_ok=True)
    ids = tokenizer.encode("a").ids
    ends = {"add_bos_token": (loaded.bos_token_id, ids[:1]), "add_eos_token": (loaded.eos_token_id, ids[-1:])}
    for key, (token, end) in ends.items():
        if settings.get(key) is True and token is not None and end != [token]:
            log.warning(
                "model.tokenizer_doubtful",
                reason=f"tokenizer_config.json says {key}, but the tokenizer does not put token {token} there, neither "
                "here nor in sentence-transformers",
            )


def _compare_with_sentencepiece(folder: Path, tokenizer: Tokenizer) -> None:
    """Warn when the conversion lost something, as transformers loses the first space of some types of models."""
    file = next(iter(sorted(folder.glob("*.model"))), None)
    if file is None or file.name == _TIKTOKEN:
        return
    from sentencepiece import SentencePieceProcessor  # no other model needs it

    pieces = SentencePieceProcessor(model_file=str(file)).encode(_LETTERS, out_type=str)
    if tokenizer.encode(_LETTERS, add_special_tokens=False).tokens != pieces:
        log.warning(
            "model.tokenizer_doubtful",
            reason=f"converted by transformers it takes texts apart otherwise than {file.name} does; a tokenizer.json "
            "beside it would be taken in its place",
        )
