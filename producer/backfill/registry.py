"""The backfills of this user on this machine: where their state folders are, for `embedstream jobs`.

One small file for each, named after the folder. It is a convenience: where it cannot be kept, a backfill runs as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from embedstream.shared.logs import get_logger

from .drafts import write_whole
from .manifest import NAME

log = get_logger()


def registry_folder() -> Path:
    """`$XDG_STATE_HOME/embedstream/backfills`."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "state") / "embedstream" / "backfills"


def remember(state_folder: Path) -> None:
    """Add a state folder."""
    lasting = str(state_folder.absolute())
    entry = registry_folder() / f"{hashlib.sha256(os.fsencode(lasting)).hexdigest()[:16]}.json"
    try:
        if not entry.exists():
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(entry, json.dumps({"state": lasting}).encode())
    except OSError as error:
        log.debug("backfill.not_registered", error=type(error).__name__)


def remembered() -> list[Path]:
    """All state folders that are still there; the others are forgotten."""
    found = []
    for entry in sorted(registry_folder().glob("*.json")):
        try:
            folder = Path(json.loads(entry.read_bytes())["state"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody else forgot it just now, or it is none of ours
        if (folder / NAME).exists():
            found.append(folder)
        else:
            with suppress(OSError):
                entry.unlink(missing_ok=True)
    return found
