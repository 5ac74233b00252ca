"""Whether vectors may stand beside those that a database holds already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedstream.shared.errors import Misconfigured

_DECISIVE = ("embedstream.fingerprint", "embedstream.task")
"""What vectors must have in common to be compared: the model with its recipe, and its adapter."""


def require_same_model(where: str, about: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Refuse vectors of another model.

    Args:
        where: the table or collection, for messages.
        about: what it says of the vectors in it; where it says nothing it takes any.
        metadata: of the vectors that are to be written.

    Raises:
        Misconfigured: they are of two models.
    """
    for key in _DECISIVE:
        if key in about and key in metadata and about[key] != metadata[key]:
            name = "embedstream.model"
            raise Misconfigured(
                f"{where} holds vectors of {about.get(name)} with {key} `{about[key]}`; these are of "
                f"{metadata.get(name)} with `{metadata[key]}`, and cannot be compared with them: name another one."
            )
