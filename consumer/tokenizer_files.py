"""The model's tokenizer in the JSON form of the `tokenizers` library, for the model card."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.logs import get_logger

log = get_logger()

_PROBES = (
    "",
    "a",
    "Hello World, 42!",
    " two  spaces ",
    "naïve Ångström ﬁ",
    "東京タワー",
    "🙂 <s> [SEP] </s>",
    "A\tB\nC",
)


def tokenizer_json(folder: Path) -> str:
    """The tokenizer as transformers reads it: the file itself when that means the same, else converted.

    `tokenizer.json` alone is not always the whole truth: `tokenizer_config.json` may change lower-casing or special
    tokens, and slow tokenizers have no such file. The file is preferred because its text, and so the card's
    fingerprint, does not depend on the version of transformers.

    Args:
        folder: where the model's tokenizer files are.

    Raises:
        ModelLoadError: no tokenizer, or one that cannot be converted.
    """
    file = folder / "tokenizer.json"
    try:
        written = file.read_text(encoding="utf-8") if file.is_file() else None
        plain = Tokenizer.from_str(written) if written is not None else None
    except Exception as error:  # the library has no class of its own for this
        raise ModelLoadError(f"{file} is damaged: {error}") from error
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = getattr(loaded, "backend_tokenizer", None)
    except Exception as error:  # whatever its files and libraries raise
        raise ModelLoadError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError(f"the tokenizer in {folder} ({type(loaded).__name__}) has no fast form")
    converted = backend.to_str()
    if written is not None and plain is not None and _ids(plain) == _ids(Tokenizer.from_str(converted)):
        return written
    log.info("model.tokenizer_converted", path=str(folder), tokenizer=type(loaded).__name__)
    return converted


def _ids(tokenizer: Tokenizer) -> list[list[int]]:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(_PROBES))]
