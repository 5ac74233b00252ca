"""What every test may use: a clean environment, and a real Valkey server for those that need Redis."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.shared.keys import Keys
from embedstream.shared.settings import PREFIX, Settings


@pytest.fixture(scope="session", autouse=True)
def _own_folders() -> Iterator[None]:
    """No test meets the settings, the running servers or the caches of the person who runs it."""
    with (
        tempfile.TemporaryDirectory(prefix="es-", ignore_cleanup_errors=True) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        for variable in [variable for variable in os.environ if variable.upper().startswith(PREFIX)]:
            patch.delenv(variable)
        for variable in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
            folder = Path(name) / variable[4:7].lower()
            folder.mkdir(mode=0o700)
            patch.setenv(variable, str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def redis_url(_own_folders: None) -> Iterator[str]:
    """A Valkey of the tests' own on a unix socket, shared by all; each test has its own key prefix."""
    with EmbeddedServer(Settings()) as server:
        yield server.url


@pytest.fixture
def prefix() -> str:
    """Beginning of this test's Redis keys."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def keys(prefix: str) -> Keys:
    """The keys of a model `m`."""
    return Keys(prefix, "m")


@pytest.fixture
def settings(redis_url: str, prefix: str) -> Settings:
    """Settings of this test's own deployment."""
    return Settings(redis_url=redis_url, key_prefix=prefix)


@pytest.fixture(scope="session")
def wordpiece_json() -> str:
    """A small BERT tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then letters, digits and two words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "##ing", "queue"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer: Tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token of a text
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()
