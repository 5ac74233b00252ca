"""Which GPUs this machine lends us, and which consumer gets which: found without torch, which takes seconds to load.

CUDA itself says it only to programs that load it. What the driver shows is read instead: `nvidia-smi -L`, which also
lists the parts that a GPU is cut into, or the driver's folder where a container has no such program.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Of CUDA: the devices a process sees, by number or id."""
_DRIVER = Path("/proc/driver/nvidia/gpus")
_LINE = re.compile(r"^(?P<part>\s+MIG)?.*\(UUID: (?P<id>[^)\s]+)\)")
_TIMEOUT_S = 20.0
"""A driver that nothing keeps loaded takes seconds to say what there is."""

log = get_logger()


def places(settings: Settings, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables that give each consumer its place.

    Args:
        settings: how many consumers: with `--consumers auto` one for each GPU, and one where there is none; a number of
            them goes round the GPUs. With a `--device` of its own all consumers use that.
        environ: of this process.

    Returns:
        For each consumer the variables that it needs beside the others.
    """
    if settings.consumers == 0:
        return []
    ours = settings.device in (None, "cuda")
    gpus = visible(environ) if ours else []
    if len(gpus) < 2:  # what each of them finds by itself is right
        return [{} for _ in range(settings.consumers or 1)]
    return [{VISIBLE: gpus[number % len(gpus)]} for number in range(settings.consumers or len(gpus))]


def placed(settings: Settings, environ: Mapping[str, str]) -> tuple[Settings, list[dict[str, str]]]:
    """The settings with the number of consumers there will be, and the place of each, as from `places`."""
    found = places(settings, environ)
    if settings.consumers is None:
        gpus = [place[VISIBLE] for place in found if place]
        log.info("consumers.placed", consumers=len(found), gpus=gpus or "one or none")
    return settings.model_copy(update={"consumers": len(found)}), found


def visible(
    environ: Mapping[str, str],
    *,
    installed: Callable[[], Sequence[str]] | None = None,
    torch_has_cuda: Callable[[], bool] | None = None,
) -> list[str]:
    """The GPUs, or parts of GPUs, that a consumer could use, each as CUDA is told of it.

    Args:
        environ: of this process; its `CUDA_VISIBLE_DEVICES` counts.
        installed: ids of all that the machine shows; by default asks the driver.
        torch_has_cuda: whether torch could use them; by default looks at its version.
    """
    if not (torch_has_cuda or _torch_has_cuda)():
        return []
    there = (installed or _installed)()
    if not there or VISIBLE not in environ:
        return list(there)
    return _chosen(environ[VISIBLE], len(there))


def _chosen(wish: str, count: int) -> list[str]:
    """The devices of `CUDA_VISIBLE_DEVICES`: like CUDA, as far as the first that is none, and none if one is twice.

    Args:
        wish: what the variable says.
        count: devices there are.
    """
    chosen: list[str] = []
    for name in map(str.strip, wish.split(",")):
        if not name or name.startswith("-") or (name.isdecimal() and int(name) >= count):
            break
        chosen.append(name)
    return chosen if len(set(chosen)) == len(chosen) else []


def _installed() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is not None:
        try:
            answer = subprocess.run(  # noqa: S603 - no shell; found by its name as a shell would
                [program, "-L"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("gpus.not_listed", program=program, error=str(error))
        else:
            return listed(answer.stdout.decode(errors="replace"))
    # Numbers, for it does not say which id each has; CUDA counts the same ones in whatever order.
    return [str(number) for number in range(len(list(_DRIVER.glob("*"))))]


def listed(text: str) -> list[str]:
    """The ids in what `nvidia-smi -L` prints: of a GPU that is cut into parts (MIG) those of its parts."""
    found: list[list[str]] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        if match["part"] and found:
            found[-1].append(match["id"])
        else:
            found.append([match["id"]])
    return [one for gpu in found for one in (gpu[1:] or gpu)]


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, as far as its version says: builds without it end in `+cpu`."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
