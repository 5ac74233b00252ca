"""What differs between the backfill of a state folder and the one that is asked for, in words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from embedstream.shared.errors import Misconfigured

from .manifest import Manifest
from .plan import InputFile

MOST_SHOWN = 5
_NANOSECOND_DIGITS = 19
"""Of a time since 1970, from 2001 on; what object stores give as a version looks different."""


def files_that_differ(was: Manifest, now: Manifest) -> list[str]:
    """What became of the files of the input, each in a few words."""
    before, after = ({file.path: file for file in manifest.files} for manifest in (was, now))
    found = [change for path, file in before.items() if (change := _change(file, after.get(path)))]
    found += [f"`{path}` is new" for path in after if path not in before]
    if not found and list(before) != list(after):
        found.append("the files stand in another order")
    return found


def options_that_differ(was: Manifest, now: Manifest, *, output: bool) -> list[str]:
    """What else decides the output and is another now. What only one of them knows, such as the model, is not compared.

    Args:
        was: what it began with.
        now: what is asked for.
        output: whether it matters where the output is.
    """
    before, after = (dict(_facts(manifest)) for manifest in (was, now))
    if not output:
        del before["OUT"]
    found = [
        f"{name} was {_shown(value)} and is now {_shown(after[name])}"
        for name, value in before.items()
        if after.get(name, value) != value
    ]
    return found + _dtypes_that_differ(was.model, now.model)


def refuse_another(was: Manifest, now: Manifest, folder: Path, *, moved: bool = False) -> None:
    """Refuse to go on with a backfill of something else.

    Args:
        was: what it began with.
        now: what is asked for.
        folder: of its state, for the message.
        moved: whether the output may be elsewhere now: the folder lies beside it.

    Raises:
        Misconfigured: what decides the output is not the same.
    """
    said = []
    if files := files_that_differ(was, now):
        began = datetime.fromisoformat(was.began)
        said.append(
            f"The input changed since the backfill of {folder} began on {began:%Y-%m-%d %H:%M} UTC: {_joined(files)}."
        )
    if options := options_that_differ(was, now, output=not moved):
        said.append(f"The backfill of {folder} began with something else: {_joined(options)}.")
    if said:
        raise Misconfigured(f"{' '.join(said)} To finish it, give it what it began with; else choose another OUT.")


def _joined(changes: list[str]) -> str:
    """Some of them, and how many more there are."""
    more = len(changes) - MOST_SHOWN
    return "; ".join(changes[:MOST_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _change(was: InputFile, now: InputFile | None) -> str:
    if now is None:
        return f"`{was.path}` is gone"
    if was.size_bytes != now.size_bytes or was.version != now.version:
        return f"`{was.path}` had {_look(was)}, now {_look(now)}"
    return "" if was.digest == now.digest else f"`{was.path}` has another content"


def _look(file: InputFile) -> str:
    version = file.version
    if version.isdecimal() and len(version) == _NANOSECOND_DIGITS:
        moment = datetime.fromtimestamp(int(version) // 1_000_000_000, UTC)
        version = f"{moment:%Y-%m-%d %H:%M:%S}.{int(version) % 1_000_000_000:09} UTC"
    return f"{file.size_bytes:,} bytes of {version}"


def _facts(manifest: Manifest) -> Iterator[tuple[str, object]]:
    """All that decides the output, under the name by which a user knows it; the last ones only where they are known."""
    asked, output, vectors, model = manifest.input, manifest.output, manifest.vectors, manifest.model
    yield "--text-column", ", ".join(asked.text_columns)
    yield "--template", asked.template
    yield "--id-column", asked.id_column
    yield "--carry", ", ".join(asked.carry)
    yield "--where", asked.where
    yield "--format", asked.format
    yield "OUT", output.path.rstrip("/")
    yield "--output-format", output.format
    yield "--vector-column", output.vector_column
    yield "--dimensions", vectors.dimensions
    yield "--normalize", vectors.normalize
    yield "--vector-dtype", vectors.dtype
    yield "--truncate", vectors.truncate_prompt_tokens == -1 or vectors.truncate_prompt_tokens
    yield "--long-inputs", vectors.long_inputs
    yield "the side that is cut", vectors.truncation_side
    yield "the adding of special tokens", vectors.add_special_tokens
    yield "the prompt (--prompt-name, --input-type)", vectors.prompt.removeprefix("role:")
    yield "--task", vectors.adapter
    yield "the columns of the output", ", ".join(f"{name} {kind}" for name, kind in manifest.columns)
    for name, key in (
        ("the model", "model"),
        ("the revision of the model", "revision"),
        ("what the model's files say (its fingerprint)", "fingerprint"),
        ("the text of the prompt", "prompt"),
    ):
        if (said := model.get(f"embedstream.{key}")) is not None:
            yield name, said


def _dtypes_that_differ(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Of a fleet that computes in several formats any may be away when it is looked at; a new one is a difference."""
    before, after = (said.get("embedstream.compute_dtype", "") for said in (was, now))
    if set(filter(None, after.split(","))) <= set(before.split(",")):
        return []
    return [f"the consumers computed in {before} and now compute in {after} (--dtype)"]


def _shown(value: object) -> str:
    match value:
        case None | "":
            return "not given"
        case bool():
            return str(value).lower()
        case _:
            return f"`{value}`"
