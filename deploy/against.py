"""What `embedstream doctor` may compare vectors with. Light to import."""

from __future__ import annotations

from enum import StrEnum


class Against(StrEnum):
    """A library whose vectors ours should equal."""

    SENTENCE_TRANSFORMERS = "sentence-transformers"
