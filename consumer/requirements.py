"""What a consumer needs beyond the base installation, looked for without importing it."""

from __future__ import annotations

from importlib.util import find_spec

from embedstream.shared import exits

_PACKAGES = ("torch", "transformers", "safetensors")
REMEDY = "a consumer needs `pip install '.[consumer]'` in embedstream's folder"
"""What to do about it."""


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in _PACKAGES if find_spec(name) is None]


def complain_if_missing() -> int:
    """Tell the user how to install what is missing; the exit code to end with, 0 when all is there."""
    names = missing()
    if not names:
        return exits.OK
    exits.complain(f"{', '.join(names)} not installed; {REMEDY}")
    return exits.FINAL
