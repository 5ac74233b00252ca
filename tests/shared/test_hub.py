"""Models of the Hub: the real huggingface_hub, against a stand-in on the loopback device."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from tests.shared.loopback_hub import COMMIT, HUB_ID, LoopbackHub, make_model, offline, replaced_hub

from embedstream.shared import hub
from embedstream.shared.errors import ModelLoadError

OTHER = COMMIT[::-1]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def remote(cache: Path) -> Iterator[LoopbackHub]:
    """The Hub that the library talks to."""
    with replaced_hub(cache) as stand_in:
        yield stand_in


def put_by_hand(cache: Path, folder: Path, *without: str) -> Path:
    """A snapshot in the cache, as a program makes it that fetches files one by one."""
    repository = cache / "models--owner--some-model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in without:
        (snapshot / name).unlink()
    return snapshot


def test_what_makes_a_model_is_fetched_once(tmp_path: Path, remote: LoopbackHub) -> None:
    others = ["onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "2_Dense/pytorch_model.bin", "a.png"]
    wanted = ["LICENSE", "a/adapter_config.json", "a/adapter_model.safetensors"]
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "m", *others, *wanted), "main")
    path = hub.snapshot(HUB_ID, None)
    assert path.name == COMMIT
    assert (path / "config.json").read_text() == "config.json of m"
    assert remote.files_sent() == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE"),
        *("a/adapter_config.json", "a/adapter_model.safetensors"),
        *("config.json", "model.safetensors", "modules.json", "tokenizer.json"),
    ]


def test_a_whole_snapshot_needs_no_network(
    tmp_path: Path, remote: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "m"), "main", "v1")
    first = hub.snapshot(HUB_ID, "v1")
    remote.asked.clear()
    assert hub.snapshot(HUB_ID, "v1") == hub.snapshot(HUB_ID, COMMIT) == first
    offline(monkeypatch)
    assert hub.snapshot(HUB_ID, "v1") == first
    assert remote.asked == []
    with pytest.raises(ModelLoadError, match=f"{HUB_ID} is no directory here, .* not in the Hub's local cache"):
        hub.snapshot(HUB_ID, None)  # nobody has asked yet where `main` is


def test_the_reason_does_not_tell_the_password_of_a_mirror(
    remote: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer's reason is read by whoever asks /health."""
    monkeypatch.setattr(constants, "ENDPOINT", remote.url.replace("://", "://user:secret@"))
    with pytest.raises(ModelLoadError, match=r"fetching it failed: .*://\*\*\*@") as caught:
        hub.snapshot(HUB_ID, None)
    assert "secret" not in str(caught.value)


def test_a_revision_is_pinned_by_its_commit(tmp_path: Path, remote: LoopbackHub) -> None:
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "old"), "v1")
    remote.put(HUB_ID, OTHER, make_model(tmp_path / "new"), "main")
    with structlog.testing.capture_logs() as logs:
        for revision, commit in ((None, OTHER), ("v1", COMMIT), (COMMIT, COMMIT)):
            assert hub.snapshot(HUB_ID, revision).name == commit
    told = [line for line in logs if line["event"] == "hub.snapshot"]
    assert [(line["revision"], line["commit"]) for line in told] == [("main", OTHER), ("v1", COMMIT), (COMMIT, COMMIT)]
    assert ["advice" in line for line in told] == [True, True, False]
    with pytest.raises(ModelLoadError, match=f"{HUB_ID} at revision v9 .* Revision Not Found"):
        hub.snapshot(HUB_ID, "v9")


@pytest.mark.parametrize(
    "part",
    [
        *("config.json", "model.safetensors", "tokenizer.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "a/adapter_model.safetensors"),
    ],
)
def test_a_part_of_a_snapshot_is_completed(
    tmp_path: Path, remote: LoopbackHub, monkeypatch: pytest.MonkeyPatch, cache: Path, part: str
) -> None:
    """Another program has fetched the others, and left no list of what there is."""
    folder = make_model(tmp_path / "m", "a/adapter_config.json", "a/adapter_model.safetensors")
    remote.put(HUB_ID, COMMIT, folder, "main")
    cached = put_by_hand(cache, folder, part)
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(ModelLoadError, match=f"lacks {part} in the Hub's local cache, and fetching it failed"):
            hub.snapshot(HUB_ID, None)
    assert hub.snapshot(HUB_ID, None) == cached
    assert (cached / part).is_file()
    assert part in remote.files_sent()


def test_what_the_hub_is_known_to_have_is_not_assumed(
    tmp_path: Path, remote: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "m"), "main")
    (hub.snapshot(HUB_ID, None) / "modules.json").unlink()
    offline(monkeypatch)
    with pytest.raises(ModelLoadError, match=r"1 file\(s\) are missing \(modules\.json\)"):
        hub.snapshot(HUB_ID, None)


def test_a_missing_shard_is_fetched(tmp_path: Path, remote: LoopbackHub) -> None:
    folder = make_model(tmp_path / "m", "model-2.safetensors")
    shards = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    remote.put(HUB_ID, COMMIT, folder, "main")
    cached = hub.snapshot(HUB_ID, None)
    (cached / "model-2.safetensors").unlink()
    assert (hub.snapshot(HUB_ID, None) / "model-2.safetensors").is_file()


def test_pickles_are_fetched_for_small_modules_alone(tmp_path: Path, remote: LoopbackHub) -> None:
    folder = make_model(tmp_path / "m", "2_Dense/pytorch_model.bin", "1_Pooling/pytorch_model.bin", "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    remote.put(HUB_ID, COMMIT, folder, "main")
    path = hub.snapshot(HUB_ID, None)
    assert [str(each.relative_to(path)) for each in path.rglob("*.bin")] == ["2_Dense/pytorch_model.bin"]
    remote.asked.clear()
    assert hub.snapshot(HUB_ID, None) == path
    assert remote.asked == []


def test_an_adapter_with_pickled_weights_alone_is_asked_for_once(tmp_path: Path, remote: LoopbackHub) -> None:
    folder = make_model(tmp_path / "m", "lora/adapter_config.json", "lora/adapter_model.bin")
    remote.put(HUB_ID, COMMIT, folder, "main")
    path = hub.snapshot(HUB_ID, None)
    assert list(path.rglob("*.bin")) == []
    remote.asked.clear()
    assert hub.snapshot(HUB_ID, None) == path
    assert remote.asked == []


def test_a_model_with_pickled_weights_alone_is_refused(tmp_path: Path, remote: LoopbackHub) -> None:
    folder = make_model(tmp_path / "m", "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    remote.put(HUB_ID, COMMIT, folder, "main")
    with pytest.raises(ModelLoadError, match=r"lacks model\.safetensors .*a pickle are never fetched"):
        hub.snapshot(HUB_ID, None)


def test_what_is_no_transformer_is_left_to_who_reads_the_modules(tmp_path: Path, remote: LoopbackHub) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "modules.json").write_text('[{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]')
    remote.put(HUB_ID, COMMIT, folder, "main")
    path = hub.snapshot(HUB_ID, None)
    remote.asked.clear()
    assert hub.snapshot(HUB_ID, None) == path
    assert remote.asked == []


def test_a_plain_transformer_is_asked_for_once(tmp_path: Path, remote: LoopbackHub) -> None:
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "m", modules=False), "main")
    path = hub.snapshot(HUB_ID, None)
    remote.asked.clear()
    assert hub.snapshot(HUB_ID, None) == path  # the cache knows that there is no modules.json
    assert remote.asked == []


def test_a_part_without_modules_is_served_when_no_more_is_to_be_had(
    tmp_path: Path, remote: LoopbackHub, cache: Path
) -> None:
    """The recipe reader warns of it."""
    path = put_by_hand(cache, make_model(tmp_path / "m", modules=False))
    assert hub.snapshot(HUB_ID, None) == path
    assert remote.asked != []  # the Hub may have had one
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks modules\.json in the Hub's local cache"):
        hub.snapshot(HUB_ID, None)


def test_modules_are_fetched_before_the_pooling_is_assumed(tmp_path: Path, remote: LoopbackHub, cache: Path) -> None:
    folder = make_model(tmp_path / "m")
    remote.put(HUB_ID, COMMIT, folder, "main")
    path = put_by_hand(cache, folder, "modules.json")
    assert hub.snapshot(HUB_ID, None) == path
    assert (path / "modules.json").is_file()


def test_an_answer_of_many_lines_is_told_in_one(remote: LoopbackHub) -> None:
    with pytest.raises(ModelLoadError) as caught:
        hub.snapshot("owner/nothing", None, "; do without it")
    message = str(caught.value)
    assert "fetching it failed: 404 Client Error. Repository Not Found for url" in message
    assert message.endswith("; do without it")
    assert "\n" not in message


def test_a_log_file_gets_no_progress_bars(
    tmp_path: Path, remote: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.put(HUB_ID, COMMIT, make_model(tmp_path / "m"), "main")
    hub.snapshot(HUB_ID, None)
    assert "%" not in capsys.readouterr().err
    assert not are_progress_bars_disabled()


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match=r"pip install '\.\[consumer\]'"):
        hub.snapshot(HUB_ID, None)
