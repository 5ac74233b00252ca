"""Where things are kept that can be made anew: the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """A folder of ours, which need not be there yet.

    Args:
        name: of what is kept in it.

    Returns:
        None for a user without a home, as in containers that are started with any number for one.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "embedstream" / name
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        return None
