"""Outputs that are files: a folder of parts, or one file that the parts are joined to in the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from embedstream.shared.errors import Misconfigured

from .drafts import publish, storage, sweep
from .part_format import Format
from .places import Place
from .plan import PartId
from .sink import OutputSchema
from .staging import StagedPart, Staging

_EMPTY = PartId(0, 0)
"""The part of an output without rows: readers need a file to know the columns by."""


class FolderSink:
    """A folder of parts.

    Args:
        place: the folder.
        form: of the files.
        schema: of the rows.
        staging: of this backfill.
        where: the folder, for messages.

    Raises:
        Misconfigured: there is something in the folder that this backfill has not made.
    """

    def __init__(self, place: Place, form: Format, schema: OutputSchema, staging: Staging, where: str) -> None:
        self._place = place
        self._form = form
        self._schema = schema
        self._staging = staging
        self._where = where
        with storage(where), staging.alone():
            if not staging.is_marked("begun"):
                _require_none(place.names(), where)
                staging.set_mark("begun")

    def begin(self, part: PartId) -> StagedPart:
        """Begin a part."""
        stem = _stem(part)
        names = _names(stem, self._form)
        drafts = self._staging.drafts(names)
        return StagedPart(self._form, self._schema, drafts, partial(_put, self._place, drafts, names), self._where)

    def finish(self, parts: Sequence[PartId]) -> None:
        """The parts are the output: make sure that they are there, and no others.

        Raises:
            Misconfigured: somebody has removed a part.
        """
        with storage(self._where), self._staging.alone():
            if not parts:
                self.begin(_EMPTY).commit()
            expected = {name for part in parts or [_EMPTY] for name in _names(_stem(part), self._form)}
            found = set(self._place.names())
            if missing := sorted(expected - found):
                raise Misconfigured(
                    f"{self._where} has lost {len(missing)} files that were committed, {missing[0]} the first: bring "
                    f"them back, or remove both the output and {self._staging.folder.parent} to begin anew."
                )
            # A part that was put, but not recorded before a kill, may have lost its last row to an error since.
            ending = "|".join(re.escape(extension) for extension in self._form.extensions)
            for name in sorted(found - expected):
                if re.fullmatch(rf"part-\d+-\d+({ending})", name):
                    self._place.remove(name)

    def close(self) -> None:
        """Nothing is held."""


class SingleFileSink:
    """One file, or a few that belong together; parts are staged, and joined in the end.

    Args:
        place: the folder it goes to.
        names: of the file, and before it of those that belong to it, one for each of the extensions of `form`.
        form: of the file.
        schema: of the rows.
        staging: of this backfill.
        where: the file, for messages.

    Raises:
        Misconfigured: there is such a file, and this backfill has not made it.
    """

    def __init__(
        self, place: Place, names: Sequence[str], form: Format, schema: OutputSchema, staging: Staging, where: str
    ) -> None:
        self._place = place
        self._names = tuple(names)
        self._form = form
        self._schema = schema
        self._staging = staging
        self._where = where
        self._parts = staging.folder / "parts"
        with storage(where), staging.alone():
            self._parts.mkdir(exist_ok=True)
            sweep(self._parts)
            if not staging.is_marked("begun"):
                _require_none(sorted({*names} & {*place.names()}), where)
                staging.set_mark("begun")

    def begin(self, part: PartId) -> StagedPart:
        """Begin a part."""
        form, paths = self._form.staged, self._paths(part)
        drafts = self._staging.drafts([path.name for path in paths])
        return StagedPart(form, self._schema, drafts, partial(_stage, drafts, paths), self._where)

    def finish(self, parts: Sequence[PartId]) -> None:
        """Join the parts, and remove them when the joined file is durable.

        Raises:
            Misconfigured: somebody has removed the file, or a part.
        """
        with storage(self._where), self._staging.alone():
            if not self._staging.is_marked("joined"):
                self._join(parts)
                self._staging.set_mark("joined")
            elif gone := sorted({*self._names} - {*self._place.names()}):
                raise Misconfigured(
                    f"{self._where} was complete, and {gone[0]} is gone: bring it back, or remove "
                    f"{self._staging.folder.parent} to begin anew."
                )
            for path in self._parts.iterdir():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held."""

    def _join(self, parts: Sequence[PartId]) -> None:
        staged = [self._paths(part) for part in parts]
        if lost := [path.name for paths in staged for path in paths if not path.exists()]:
            raise Misconfigured(
                f"{self._parts} has lost {len(lost)} files that were committed, {lost[0]} the first: bring them back, "
                f"or remove {self._staging.folder.parent} to begin anew."
            )
        drafts = self._staging.drafts(self._names)
        try:
            self._form.join(staged, drafts, self._schema)
            _put(self._place, drafts, self._names)
        finally:
            for draft in drafts:
                draft.unlink(missing_ok=True)

    def _paths(self, part: PartId) -> tuple[Path, ...]:
        return tuple(self._parts / name for name in _names(_stem(part), self._form.staged))


def _stem(part: PartId) -> str:
    return f"part-{part.name}"


def _names(stem: str, form: Format) -> list[str]:
    return [f"{stem}{extension}" for extension in form.extensions]


def _put(place: Place, drafts: Sequence[Path], names: Sequence[str]) -> None:
    for draft, name in zip(drafts, names, strict=True):
        place.put(draft, name)


def _stage(drafts: Sequence[Path], paths: Sequence[Path]) -> None:
    for draft, path in zip(drafts, paths, strict=True):
        publish(draft, path)


def _require_none(found: Sequence[str], where: str) -> None:
    if found:
        raise Misconfigured(
            f"{where} exists already, with {found[0]} in it, and this backfill has not made it: choose another OUT, or "
            "remove it."
        )
