"""Where a running `serve` is to be found.

Each `serve` leaves one JSON file, readable by its user alone, in a folder no other user can write to. It names the
process by pid and start time, so a pid that was given to another program is never taken for a live server. What
lives only as long as the server (socket, log) lies in a private folder whose name carries the same two numbers:
a sweep recognises what a crash left behind even when no run file was written yet.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import ServerNotFound
from .processes import Identity
from .settings import Settings
from .urls import without_password

SOCKET_NAME = "v.sock"
SOCKET_PATH_BYTES = 103
"""Longest path of a unix socket: `sun_path` has 104 bytes on macOS and 108 on Linux, with a zero at the end."""

_LAST_RESORT = Path("/tmp")  # noqa: S108 - short on every system; the folder made in it is checked before use


@dataclass(frozen=True, slots=True)
class RunFile:
    """What a running `serve` tells the other commands.

    Args:
        process: pid and start time of the `serve` process.
        redis_url: the queue; it may hold a password, hence the file's mode 0600.
        http_url: where HTTP clients reach it.
        port: its HTTP port.
        model: the model as `--model` takes it.
        served_names: names clients use; the first names the queue.
        key_prefix: beginning of its Redis keys.
        folder: the private folder it owns; None when it uses a Redis of somebody else.
    """

    process: Identity
    redis_url: str
    http_url: str
    port: int
    model: str
    served_names: tuple[str, ...]
    key_prefix: str
    folder: Path | None = None

    @property
    def served_model(self) -> str:
        """The name that is shown to clients."""
        return self.served_names[0]

    def dump(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self) | {"folder": str(self.folder) if self.folder else None})

    @classmethod
    def parse(cls, text: str) -> RunFile:
        """Read a file's content.

        Raises:
            ValueError: it is no run file of this version.
        """
        try:
            values = json.loads(text)
            process, names, folder = values.pop("process"), values.pop("served_names"), values.pop("folder")
            return cls(
                process=Identity(int(process["pid"]), int(process["started"])),
                served_names=tuple(map(str, names)),
                folder=Path(folder) if folder else None,
                **values,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a run file: {error!r}") from error


def write(run: RunFile) -> Path:
    """Publish a run file, all of it or none, and return its path."""
    folder = _create(_homes()[0])
    path = folder / f"{os.getuid()}-{run.port}.json"
    other = _read(path)
    if other is not None and other.process != run.process and other.process.is_alive:
        # Two servers may share a port on different addresses; neither may hide the other.
        path = path.with_stem(f"{path.stem}-{run.process.pid}")
    draft = folder / f".{_mark(run.process)}.tmp"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(run.dump())
    draft.replace(path)
    return path


def find_live() -> list[RunFile]:
    """The running servers of this user, by port.

    Raises:
        PermissionError: the folder of run files is not ours alone.
    """
    found = [run for path in _run_files() if (run := _read(path)) is not None and run.process.is_alive]
    return sorted(found, key=lambda run: run.port)


def the_only_live(model: str | None = None) -> RunFile:
    """The one running server of this user, or the one of several that serves a model.

    Args:
        model: a served name; None where the caller named none.

    Raises:
        ServerNotFound: there is none, or more than one.
        PermissionError: the folder of run files is not ours alone.
    """
    live = find_live()
    if not live:
        raise ServerNotFound(
            "No running server was found: start one with `embedstream serve`, or name a Redis with --redis-url "
            '(EMBEDSTREAM_REDIS_URL; in Python Producer("redis://…")).'
        )
    if len(live) == 1:
        return live[0]
    serving = [run for run in live if model in run.served_names]
    if len(serving) == 1:
        return serving[0]
    which = "" if model is None else f", {len(serving) or 'none'} of them with `{model}`"
    lines = [
        f"  port {run.port}: {run.served_model} on {run.http_url}, --redis-url {without_password(run.redis_url)}"
        for run in live
    ]
    raise ServerNotFound(
        f"{len(live)} servers are running{which}. Name one by its Redis: with --redis-url, EMBEDSTREAM_REDIS_URL, or "
        'in Python Producer("unix://…"); or by --model where only one serves it.\n' + "\n".join(lines)
    )


def connected(settings: Settings) -> Settings:
    """The settings with a Redis URL: the one given, or that of the only live server, or of the only one with the model.

    From a server come also its key prefix and model, where those are not set: the caller means that server's queue.

    Raises:
        ServerNotFound: no URL is given, and there is no server or more than one.
        PermissionError: the folder of run files is not ours alone.
    """
    if settings.redis_url:
        return settings
    run = the_only_live(settings.chosen_model)
    update: dict[str, object] = {"redis_url": run.redis_url}
    if "key_prefix" not in settings.model_fields_set:
        update["key_prefix"] = run.key_prefix
    if settings.model_fields_set.isdisjoint({"model", "served_model_name"}):
        update |= {"model": run.model, "served_model_name": run.served_names}
    return settings.model_copy(update=update)


def create_private_folder(process: Identity) -> Path:
    """Create the folder a server keeps its socket and log in; only its user may enter.

    It lies beside the run files unless a socket's path would grow too long there.

    Raises:
        PermissionError: the folder above it is not ours alone.
    """
    for above in [*_homes(), _last_resort()]:
        longest = above / f"{_mark(process)}-12345678" / SOCKET_NAME
        if len(os.fsencode(longest)) <= SOCKET_PATH_BYTES:
            return Path(tempfile.mkdtemp(prefix=f"{_mark(process)}-", dir=_create(above)))
    raise PermissionError("no folder with a path short enough for a unix socket: set TMPDIR to a short one")


def is_embedded(redis_url: str) -> bool:
    """Whether a URL leads to the embedded Valkey of a `serve`: its socket lies in a private folder of that."""
    return owner_of(redis_url) is not None


def owner_of(redis_url: str) -> Identity | None:
    """The `serve` whose embedded Valkey a URL leads to; None where it leads elsewhere."""
    path = Path(redis_url.removeprefix("unix://"))
    embedded = redis_url.startswith("unix://") and path.name == SOCKET_NAME
    return _owner_by_name(path.parent.name) if embedded else None


def sweep() -> list[Path]:
    """Remove what servers that are dead left behind, and nothing else.

    Returns:
        The removed files and folders.
    """
    removed: list[Path] = []
    for above in _existing([*_homes(), _last_resort()]):
        for path in sorted(above.iterdir()):
            run = _read(path) if path.suffix == ".json" else None
            owner = run.process if run is not None else _owner_by_name(path.name)
            if owner is None or owner.is_alive:
                continue
            # The folder of a run file is found under its own name, so no path read from a file is ever removed.
            if path.is_dir() and not path.is_symlink():
                with suppress(FileNotFoundError):  # another sweep is at it and removes the rest
                    shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _mark(process: Identity) -> str:
    return f"serve-{process.pid}-{process.started}"


def _owner_by_name(name: str) -> Identity | None:
    found = re.match(r"\.?serve-(\d+)-(\d+)[-.]", name)
    return Identity(int(found[1]), int(found[2])) if found else None


def _read(path: Path) -> RunFile | None:
    """The run file at a path; None when it is gone or something else."""
    try:
        return RunFile.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _run_files() -> Iterator[Path]:
    for folder in _existing(_homes()):
        yield from sorted(folder.glob("*.json"))


def _homes() -> list[Path]:
    """The folders of run files, best first; a client may lack the server's environment, so it looks in both."""
    found = [Path(tempfile.gettempdir()) / _own_name()]
    session = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    # Under sudo the variable may name another user's folder, which is not for us to write to.
    if session.is_absolute() and session.is_dir() and session.stat().st_uid == os.getuid():
        found.insert(0, session / "embedstream")
    return found


def _last_resort() -> Path:
    return _LAST_RESORT / _own_name()


def _own_name() -> str:
    return f"embedstream-{os.getuid()}"


def _existing(folders: list[Path]) -> list[Path]:
    """Those that exist and are ours alone. The first one must be; the others can then hold nothing of ours."""
    first, *others = dict.fromkeys(folders)
    usable = [_ours_alone(first)] if os.path.lexists(first) else []
    return usable + [folder for folder in others if os.path.lexists(folder) and _objection(folder) is None]


def _create(folder: Path) -> Path:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    return _ours_alone(folder)


def _ours_alone(folder: Path) -> Path:
    """Refuse a folder another user could have prepared: the run file says whom we trust with our texts."""
    objection = _objection(folder)
    if objection is not None:
        raise PermissionError(
            f"{folder} must be a folder of uid {os.getuid()} with mode 0700, but {objection}. "
            "Remove it, or name another place with XDG_RUNTIME_DIR or TMPDIR."
        )
    return folder


def _objection(folder: Path) -> str | None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "it is no folder"
    if status.st_uid != os.getuid():
        return f"it belongs to uid {status.st_uid}"
    if status.st_mode & 0o077:
        return f"its mode is {stat.S_IMODE(status.st_mode):04o}"
    return None
