from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from embedstream.consumer.measured import Conditions, Measured, Value, device_name, folder_of
from embedstream.shared.settings import Settings

CONDITIONS = Conditions("0123abcd", "cpu Some CPU", "float32", 2, {"torch": "2.11"})


@pytest.mark.parametrize("value", [1.5, 7, True, "bert", None, [1, [2.5, "x"]], {"a": {"b": [1]}}])
def test_what_was_measured_is_known_at_the_next_start(tmp_path: Path, value: Value) -> None:
    Measured(CONDITIONS, tmp_path).put("budget", value)
    assert Measured(CONDITIONS, tmp_path).get("budget") == value
    assert Measured(CONDITIONS, tmp_path).get("other") is None


@pytest.mark.parametrize(
    "changed", [{"weights": "x"}, {"device": "x"}, {"dtype": "x"}, {"threads": 3}, {"versions": {"torch": "2.12"}}]
)
def test_under_other_conditions_nothing_is_known(tmp_path: Path, changed: dict[str, object]) -> None:
    Measured(CONDITIONS, tmp_path).put("budget", 1)
    assert Measured(replace(CONDITIONS, **changed), tmp_path).get("budget") is None  # type: ignore[arg-type]


def test_a_number_format_has_measurements_of_its_own(tmp_path: Path) -> None:
    before = Measured(replace(CONDITIONS, dtype=""), tmp_path)
    before.put("format", "bfloat16")
    chosen = before.with_dtype("bfloat16")
    assert chosen.get("format") is None
    chosen.put("format", 1)
    assert (before.get("format"), chosen.get("format")) == ("bfloat16", 1)


def damage(path: Path, how: str) -> None:
    written = path.read_bytes()
    if how == "is a folder":
        path.unlink()
        path.mkdir()
        return
    path.write_bytes(
        {
            "cut off": written[:20],
            "empty": b"",
            "no object": b"[1]",
            "no value": b'{"conditions": {}}',
            "of others": written.replace(b"0123abcd", b"4567abcd"),
            "too large": written + b" " * 100_000,
            "no text": b"\xff\xfe",
        }[how]
    )


@pytest.mark.parametrize(
    "how", ["cut off", "empty", "no object", "no value", "of others", "too large", "no text", "is a folder"]
)
def test_a_damaged_file_is_measured_anew(tmp_path: Path, how: str) -> None:
    Measured(CONDITIONS, tmp_path).put("budget", 1)
    (path,) = tmp_path.rglob("budget.json")
    damage(path, how)
    with capture_logs() as logs:
        assert Measured(CONDITIONS, tmp_path).get("budget") is None
    assert [(line["event"], line["path"]) for line in logs] == [("measured.ignored", str(path))]


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    Measured(CONDITIONS, tmp_path).put("budget", 1)
    (path,) = tmp_path.rglob("budget.json")
    damage(path, "cut off")
    Measured(CONDITIONS, tmp_path).put("budget", 2)
    assert Measured(CONDITIONS, tmp_path).get("budget") == 2
    assert [*path.parent.iterdir()] == [path]


def test_a_folder_that_cannot_be_written_only_costs_the_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    measured = Measured(CONDITIONS, tmp_path / "file" / "measured")
    with capture_logs() as logs:
        measured.put("budget", 1)
    assert [line["event"] for line in logs] == ["measured.not_kept"]
    assert measured.get("budget") == 1  # this process has measured it all the same


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measured = Measured(CONDITIONS, None)
    measured.put("budget", 1)
    assert measured.get("budget") == 1
    assert Measured(CONDITIONS, None).get("budget") is None
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["", "../budget", "a/b", "Budget", ".budget", "x" * 65])
def test_names_are_no_paths(tmp_path: Path, name: str) -> None:
    measured = Measured(CONDITIONS, tmp_path)
    with pytest.raises(ValueError, match="no name of a measurement"):
        measured.get(name)
    with pytest.raises(ValueError, match="no name of a measurement"):
        measured.put(name, 1)


def _measure(folder: Path, number: int) -> None:
    measured = Measured(CONDITIONS, folder)
    for _ in range(50):
        measured.put(f"of-{number}", [number] * 1000)
        measured.put("shared", [number] * 1000)
        read = Measured(CONDITIONS, folder).get("shared")
        assert isinstance(read, list)
        assert len(read) == 1000
        assert len(set(map(str, read))) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks, since Python 3.12
def test_consumers_that_start_at_once_do_not_undo_each_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_measure, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for number in range(4):
        assert Measured(CONDITIONS, tmp_path).get(f"of-{number}") == [number] * 1000


def test_settings_say_whether_and_where(tmp_path: Path) -> None:
    settings = Settings(measured_dir=tmp_path)
    cpu = torch.device("cpu")
    Measured.of(settings, "r", cpu, 2).put("budget", 1)
    assert Measured.of(settings, "r", cpu, 2).get("budget") == 1
    assert Measured.of(settings.model_copy(update={"keep_measurements": False}), "r", cpu, 2).get("budget") is None
    folder = folder_of(Settings())
    assert folder is not None
    assert folder.parts[-2:] == ("embedstream", "measured")
    conditions = Measured.of(settings, "r", cpu, 2, "float32").conditions
    assert (conditions.weights, conditions.threads, conditions.dtype) == ("r", 2, "float32")
    assert conditions.device == device_name(cpu)
    assert set(conditions.versions) == {"torch", "transformers", "embedstream"}


def test_a_user_without_a_home_measures_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("embedstream.consumer.measured.cache_folder", lambda _: None)
    cpu = torch.device("cpu")
    with capture_logs() as logs:
        measured = Measured.of(Settings(), "r", cpu, 2)
    assert [(line["event"], line["advice"]) for line in logs] == [("measured.not_kept", "--measured-dir")]
    measured.put("budget", 1)
    assert measured.get("budget") == 1
    assert Measured.of(Settings(measured_dir=tmp_path), "r", cpu, 2).get("budget") is None


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    measured = Measured(CONDITIONS, tmp_path / "file" / "measured")
    with capture_logs() as logs:
        for number in range(3):
            measured.put("budget", number)
    assert [line["log_level"] for line in logs] == ["warning", "debug", "debug"]


def test_cpus_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(family: int, flags: str) -> str:
        text = f"model name\t: AMD EPYC\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: {flags}\n"
        monkeypatch.setattr(Path, "read_text", lambda _: text)
        return device_name.__wrapped__(torch.device("cpu"))  # past its cache

    names = {named(25, "avx2"), named(26, "avx2"), named(26, "avx2 avx512f")}
    assert len(names) == 3
    assert named(26, "avx512f avx2") in names
