"""A model of the Hugging Face Hub: from its local cache when all of it is there, else fetched."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ModelLoadError
from .logs import get_logger
from .model_files import (
    LICENCES,
    OTHER_RUNTIMES,
    PATTERNS,
    missing,
    missing_of_adapters,
    missing_of_transformer,
    pickles_needed,
)
from .urls import without_secrets

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_REASON = 400
_LISTED = "modules.json"

log = get_logger()


def snapshot(hub_id: str, revision: str | None, hint: str = "") -> Path:
    """The folder with a model's files; its name is the commit they are of.

    What is cached as a whole is taken without asking the Hub. `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN` and the
    cache's place are those of huggingface_hub.

    Args:
        hub_id: owner/name.
        revision: branch, tag or commit; None for the branch `main`.
        hint: how to do without the Hub, for the message.

    Raises:
        ModelLoadError: not cached as a whole, and not to be fetched.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors  # the library loads its parts when they are imported
        import huggingface_hub.utils
    except ImportError as error:
        raise ModelLoadError(
            f"no directory and no installed package holds {hub_id}, and huggingface_hub is not installed to fetch it: "
            f"pip install '.[consumer]' in embedstream's folder{hint}"
        ) from error
    cached = _cached(huggingface_hub, hub_id, revision)
    lacking = "not in the Hub's local cache" if cached is None else _lacking(huggingface_hub, hub_id, cached)
    if cached is not None and lacking is None:
        _tell(hub_id, revision, cached)
        return cached
    reason = (
        "the Hub has no such file, or cannot be reached (weights that are a pickle are never fetched: load the model "
        "with sentence-transformers, save it to a folder, and serve that)"
    )
    try:
        with _bars_for_people_alone(huggingface_hub.utils):
            cached = _fetch(huggingface_hub, hub_id, revision)
        lacking = _lacking(huggingface_hub, hub_id, cached)  # the library takes what it has when the Hub is away
    except Exception as error:  # noqa: BLE001 - besides its own errors the library lets through its HTTP client's
        said = without_secrets(str(error)) or type(error).__name__
        reason = textwrap.shorten(said, _LONGEST_REASON, placeholder=" …")
    if cached is not None and (lacking is None or _is_plain(cached)):
        _tell(hub_id, revision, cached)
        return cached
    at = f" at revision {revision}" if revision else ""
    raise ModelLoadError(
        f"{hub_id}{at} is no directory here, no installed package and {lacking}, and fetching it failed: {reason}{hint}"
    )


def _cached(library: Any, hub_id: str, revision: str | None) -> Path | None:
    # Asked for the least: what else lacks is for us to judge, who know what is needed.
    wanted = ["config.json", _LISTED]
    with suppress(OSError, ValueError):  # not cached; or not a legal id, which the Hub will say
        return Path(library.snapshot_download(hub_id, revision=revision, allow_patterns=wanted, local_files_only=True))
    return None


def _lacking(library: Any, hub_id: str, cached: Path) -> str | None:
    """What is wrong with a cached snapshot, in words; None when it is whole."""

    def is_nowhere(name: str) -> bool:
        """Whether the cache knows that the Hub has no such file either."""
        return library.try_to_load_from_cache(hub_id, name, revision=cached.name) is not None

    lacking = missing(cached)
    if lacking == _LISTED and is_nowhere(_LISTED):
        lacking = missing_of_transformer(cached)
    if lacking is None:
        lacking = next((name for name in missing_of_adapters(cached) if not is_nowhere(name)), None)
    return None if lacking is None else f"lacks {lacking} in the Hub's local cache"


def _is_plain(cached: Path) -> bool:
    """Whether nothing lacks but a `modules.json`, which there may never have been: the recipe reader warns of that."""
    return missing(cached) == _LISTED and missing_of_transformer(cached) is None


def _fetch(library: Any, hub_id: str, revision: str | None) -> Path:
    log.info("hub.fetching", model=hub_id, revision=revision or "main")
    ignored = list(OTHER_RUNTIMES)
    patterns = [*PATTERNS, *LICENCES]
    folder = Path(
        library.snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
    )
    if pickles := pickles_needed(folder):
        library.snapshot_download(hub_id, revision=folder.name, allow_patterns=pickles)
    for name in (*([] if (folder / _LISTED).is_file() else [_LISTED]), *missing_of_adapters(folder)):
        # Asked for by name, so that the cache remembers that there is none, and the next start need not ask again.
        with suppress(library.errors.EntryNotFoundError):
            library.hf_hub_download(hub_id, name, revision=folder.name)
    return folder


@contextmanager
def _bars_for_people_alone(utilities: Any) -> Iterator[None]:
    """No progress bars in a log file; the library draws one there for the number of files."""
    if sys.stderr.isatty() or utilities.are_progress_bars_disabled():
        yield
        return
    utilities.disable_progress_bars()
    try:
        yield
    finally:
        utilities.enable_progress_bars()


def _tell(hub_id: str, revision: str | None, folder: Path) -> None:
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    advice = {} if pinned else {"advice": "a branch moves; --revision with the commit pins it"}
    log.info("hub.snapshot", model=hub_id, revision=revision or "main", commit=folder.name, **advice)
