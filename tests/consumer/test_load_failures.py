"""A model that cannot be loaded: one line, exit 78, and the reason where those find it who look from afar."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from embedstream.consumer import main
from embedstream.consumer.model import Model
from embedstream.shared import load_failures
from embedstream.shared.keys import Keys, failures
from embedstream.shared.model_files import digests_of
from embedstream.shared.model_manifest import ModelManifest
from embedstream.shared.settings import Settings

Make = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("same_logging")


@pytest.fixture(autouse=True)
def never_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that came up would stay."""

    def serve(*_: object) -> None:
        pytest.fail("the consumer serves")

    monkeypatch.setattr(main, "serve", serve)


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unknown_module(folder: Path) -> None:
    path = folder / "modules.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps([*listed, {"idx": 9, "name": "9", "path": "9_Magic", "type": "somebody.else.Magic"}]))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def weights_of_another_size(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:, :16].contiguous()
    save_file(tensors, path, {"format": "pt"})


def weights_that_lack_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, path, {"format": "pt"})


def corrupt_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:-20])


def config_with_words_for_numbers(folder: Path) -> None:
    edit(folder / "config.json", num_attention_heads="four")


def config_that_does_not_add_up(folder: Path) -> None:
    edit(folder / "config.json", num_attention_heads=5)


def binary_config(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_bytes(b"\xff\xfe\x00")


def no_pooling_config(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").unlink()


def unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="never-heard-of", architectures=["NeverHeardOf"])


def tokenizer_of_a_larger_model(folder: Path) -> None:
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"token{number}") for number in range(10)])
    tokenizer.save(str(folder / "tokenizer.json"))


def corrupt_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def a_file_that_cannot_be_read(folder: Path) -> None:
    """Nobody may, not even root: there is nothing at its beginning."""
    (folder / "vocab.txt").symlink_to("/proc/self/mem")


def changed_after_it_was_fetched(folder: Path) -> None:
    ModelManifest("owner/m", "0" * 40, digests_of(folder)).write(folder)
    edit(folder / "1_Pooling" / "config.json", pooling_mode="cls")


CASES: dict[Callable[[Path], None], str] = {
    unknown_module: "modules.json: .*'?somebody.else.Magic",
    no_weights: "has no weights: model.safetensors is missing",
    pickled_weights: "has its weights as pytorch_model.bin, a pickle",
    cut_weights: "the model in .* cannot be loaded: ",
    weights_of_another_size: "weight is 88x16 there, and 88x32 by the configuration",
    weights_that_lack_a_tensor: "lack 1 tensors of BertModel, such as encoder.layer.1.attention.self.query.weight",
    corrupt_config: "config.json is damaged: ",
    config_with_words_for_numbers: "num_attention_heads': TypeError: .*expected int, got str",
    config_that_does_not_add_up: "hidden size .* attention heads",
    binary_config: "1_Pooling/config.json is damaged: ",
    no_pooling_config: "1_Pooling/config.json is missing",
    unknown_architecture: "never-heard-of",
    tokenizer_of_a_larger_model: "it is not this model's tokenizer",
    corrupt_tokenizer: "tokenizer.json is damaged: ",
    no_tokenizer: "has no tokenizer: tokenizer.json is missing",
    weights_that_are_a_folder: "cannot be loaded: ",
    a_file_that_cannot_be_read: "the model's files cannot be read: .*/vocab.txt",
    changed_after_it_was_fetched: "1_Pooling/config.json is damaged or was changed",
}


def run_in_vain(settings: Settings, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a consumer that must not come up; what its one line says."""
    capfd.readouterr()  # making the model drew a progress bar
    assert main.run(settings) == 78
    out, err = capfd.readouterr()
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith("embedstream: ")]
    assert len(said) == 1, err
    events = [json.loads(line) for line in err.splitlines() if not line.startswith("embedstream: ")]
    (told,) = [event for event in events if event["event"] == "consumer.cannot_serve"]
    assert f"embedstream: {told['reason']}" == said[0]
    assert "consumer.load_failed" not in [event["event"] for event in events]  # somebody has thought of it
    return str(told["reason"])


@pytest.mark.integration
@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_what_cannot_be_loaded(
    tiny_bert: Make,
    redis_url: str,
    prefix: str,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    folder = tiny_bert()
    damage(folder)
    settings = Settings(model=str(folder), redis_url=redis_url, key_prefix=prefix, device="cpu", log_format="json")
    said = run_in_vain(settings, capfd)
    assert re.search(CASES[damage], said), said
    with Redis.from_url(redis_url) as redis:
        (key,) = redis.scan_iter(f"{Keys(prefix, folder.name).base}:status:*")
        assert redis.get(key) == said.encode()
        assert 0 < redis.ttl(key) <= load_failures.STATUS_TTL_S
        assert redis.hgetall(failures(prefix)) == {folder.name.encode(): key}


@pytest.mark.integration
def test_a_directory_that_is_not_there(redis_url: str, prefix: str, capfd: pytest.CaptureFixture[str]) -> None:
    settings = Settings(model="/no/such/model", redis_url=redis_url, key_prefix=prefix, log_format="json")
    assert "there is no such directory" in run_in_vain(settings, capfd)


@pytest.mark.integration
def test_what_nobody_has_thought_of(
    tiny_bert: Make,
    redis_url: str,
    prefix: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No endless restarts with a traceback each."""

    def fail(settings: Settings) -> None:
        raise ValueError("many\nlines")

    monkeypatch.setattr(Model, "load", fail)
    folder = tiny_bert()
    assert main.run(Settings(model=str(folder), redis_url=redis_url, key_prefix=prefix)) == 78
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == f"embedstream: {folder} cannot be loaded: ValueError: many lines"
    assert "consumer.load_failed" in err
    assert "Traceback" in err


@pytest.mark.integration
def test_what_is_said_at_length_is_shortened(
    tiny_bert: Make, redis_url: str, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """/health tells it to whoever asks."""
    folder = tiny_bert()
    edit(folder / "config.json", hidden_act="x" * 100_000)
    said = run_in_vain(
        Settings(model=str(folder), redis_url=redis_url, key_prefix=prefix, device="cpu", log_format="json"), capfd
    )
    assert 2000 < len(said) < 2100
    with Redis.from_url(redis_url) as redis:
        assert load_failures.newest(redis, prefix, folder.name) == said


@pytest.mark.integration
@pytest.mark.parametrize("names", [("m",), ()])
def test_a_folder_whose_name_is_no_unicode(
    tiny_bert: Make, redis_url: str, prefix: str, capfd: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    folder = tiny_bert()
    no_weights(folder)
    folder = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
    settings = Settings(
        model=str(folder), served_model_name=names, redis_url=redis_url, key_prefix=prefix, log_format="json"
    )
    assert r"\udcff has no weights" in run_in_vain(settings, capfd)
    with Redis.from_url(redis_url) as redis:
        assert [name for name in names if r"\udcff" in (load_failures.newest(redis, prefix, name) or "")] == [*names]


def test_without_redis_the_reason_is_on_stderr_alone(
    tiny_bert: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bert()
    no_weights(folder)
    nowhere = f"unix://{tmp_path / 'no.sock'}"
    said = run_in_vain(Settings(model=str(folder), redis_url=nowhere, device="cpu", log_format="json"), capfd)
    assert "has no weights" in said
