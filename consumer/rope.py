"""Rotary positions whose frequencies change with the longest sequence that is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedstream.shared.errors import ModelLoadError

_LONG, _DYNAMIC = "longrope", "dynamic"


def follows_longest(config: Any, max_length: int) -> bool:
    """Whether the vector of a text depends on how long the longest one of its batch is, as in Phi-3 with LongRoPE.

    Args:
        config: of transformers.
        max_length: most tokens of an input. Up to the length that the model was trained with nothing changes.

    Raises:
        ModelLoadError: it would depend on what was computed before, too: dynamic frequencies stay until a short text.
    """
    text = config.get_text_config()
    follows = False
    for rope in _parameters(text):
        kind = str(rope.get("rope_type"))
        if _DYNAMIC in kind and max_length > (trained := text.max_position_embeddings):
            raise ModelLoadError(
                f"the model changes its positions with the longest text so far (rope_type {kind}) beyond {trained} "
                f"tokens, and reads {max_length}: set --max-model-len {trained}"
            )
        follows |= kind == _LONG and max_length > rope.get("original_max_position_embeddings", max_length)
    return follows


def _parameters(config: Any) -> list[Mapping[str, Any]]:
    """Those of the model, or of each kind of its layers; none without rotary positions."""
    written = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in written.values() if isinstance(part, Mapping)]
    return parts or [written]
