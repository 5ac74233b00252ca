from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from embedstream.shared import runfile
from embedstream.shared.errors import ServerNotFound
from embedstream.shared.processes import Identity, identity_of, own_identity
from embedstream.shared.settings import Settings


@pytest.fixture(autouse=True)
def session(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tmp_path_factory.getbasetemp()  # pytest makes its own folder at first use, and must not make it below ours
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        for variable, part in (("XDG_RUNTIME_DIR", "run"), ("TMPDIR", "tmp")):
            (Path(name) / part).mkdir(mode=0o700)
            monkeypatch.setenv(variable, str(Path(name) / part))
        monkeypatch.setattr(tempfile, "tempdir", str(Path(name) / "tmp"))
        for variable in [name for name in os.environ if name.upper().startswith("EMBEDSTREAM_")]:
            monkeypatch.delenv(variable)
        yield Path(name) / "run"


def a_run(port: int = 8000, process: Identity | None = None, folder: Path | None = None) -> runfile.RunFile:
    return runfile.RunFile(
        process=process or own_identity(),
        redis_url=f"unix:///somewhere/{port}.sock",
        http_url=f"http://127.0.0.1:{port}",
        port=port,
        model="owner/some-model",
        served_names=("some-model", "owner/some-model"),
        key_prefix="ek",
        folder=folder,
    )


def a_dead_process() -> Identity:
    with subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        identity = identity_of(child.pid)
        assert identity is not None
        assert identity.is_alive
    return identity


def test_what_is_written_is_found(session: Path) -> None:
    run = a_run(folder=session / "private")
    path = runfile.write(run)
    assert path == session / "embedstream" / f"{os.getuid()}-8000.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert runfile.find_live() == [run]
    assert runfile.the_only_live() == run
    assert run.served_model == "some-model"


def test_without_a_session_folder_the_temporary_one_is_used(
    session: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        path = runfile.write(a_run())
        assert path.parent == session.parent / "tmp" / f"embedstream-{os.getuid()}"


def test_a_client_finds_a_server_that_had_no_session_folder(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    runfile.write(a_run())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    assert runfile.find_live() == [a_run()]


@pytest.mark.parametrize("fault", ["mode", "file", "link"])
def test_a_folder_that_others_could_have_made_is_refused(session: Path, tmp_path: Path, fault: str) -> None:
    folder = session / "embedstream"
    if fault == "mode":
        folder.mkdir()
        folder.chmod(0o750)
    elif fault == "file":
        folder.touch()
    else:
        folder.symlink_to(tmp_path)
    for call in (runfile.find_live, runfile.sweep, lambda: runfile.write(a_run())):
        with pytest.raises(PermissionError, match=r"0700.*XDG_RUNTIME_DIR"):
            call()


def test_none_and_several() -> None:
    with pytest.raises(ServerNotFound, match="embedstream serve"):
        runfile.the_only_live()
    runfile.write(a_run(8001))
    runfile.write(replace(a_run(8000), redis_url="redis://user:secret@host/0"))
    with pytest.raises(ServerNotFound) as caught:
        runfile.the_only_live()
    text = str(caught.value)
    assert "--redis-url unix:///somewhere/8001.sock" in text
    assert "port 8000: some-model on http://127.0.0.1:8000" in text
    assert all(way in text for way in ("--redis-url", "EMBEDSTREAM_REDIS_URL", 'Producer("unix://…")'))
    assert "secret" not in text
    assert [run.port for run in runfile.find_live()] == [8000, 8001]


def test_of_several_the_only_one_with_the_model_is_meant() -> None:
    runfile.write(a_run(8000))
    runfile.write(replace(a_run(8001), served_names=("other", "owner/other")))
    assert runfile.the_only_live("owner/other").port == 8001
    assert runfile.connected(Settings(model="owner/some-model")).redis_url == "unix:///somewhere/8000.sock"
    with pytest.raises(ServerNotFound, match="2 servers are running, none of them with `third`"):
        runfile.connected(Settings(model="third"))
    runfile.write(a_run(8002))
    with pytest.raises(ServerNotFound, match="3 servers are running, 2 of them with `some-model`"):
        runfile.the_only_live("some-model")


def test_an_embedded_queue_is_known_by_its_url() -> None:
    folder = runfile.create_private_folder(own_identity())
    assert runfile.is_embedded(f"unix://{folder}/{runfile.SOCKET_NAME}")
    for other in (
        "redis://queue:6379",
        "unix:///var/run/redis.sock",
        f"unix://{folder}/other.sock",
        f"redis://{folder}/v.sock",
    ):
        assert not runfile.is_embedded(other)


def test_a_second_server_on_the_port_hides_no_live_one() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        other = identity_of(child.pid)
        runfile.write(a_run(process=other))
        runfile.write(a_run())
        assert {run.process for run in runfile.find_live()} == {other, own_identity()}
    assert runfile.find_live() == [a_run()]


def test_the_dead_are_not_found_and_swept_with_their_folders() -> None:
    dead = a_dead_process()
    folder = runfile.create_private_folder(dead)
    (folder / runfile.SOCKET_NAME).touch()
    (folder / "sub").mkdir()
    path = runfile.write(a_run(process=dead, folder=folder))
    assert runfile.find_live() == []
    assert set(runfile.sweep()) == {path, folder}
    assert not path.exists()
    assert not folder.exists()
    assert runfile.sweep() == []


def test_a_pid_given_to_another_process_counts_as_dead() -> None:
    earlier = replace(own_identity(), started=own_identity().started - 1)
    folder = runfile.create_private_folder(earlier)
    path = runfile.write(a_run(process=earlier, folder=folder))
    assert runfile.find_live() == []
    assert set(runfile.sweep()) == {path, folder}


def test_a_crash_before_the_run_file_is_swept(session: Path) -> None:
    dead = a_dead_process()
    folder = runfile.create_private_folder(dead)
    draft = folder.parent / f".serve-{dead.pid}-{dead.started}.tmp"
    draft.touch()
    assert set(runfile.sweep()) == {folder, draft}
    assert list((session / "embedstream").iterdir()) == []


def test_a_sweep_keeps_what_is_alive_or_unknown() -> None:
    folder = runfile.create_private_folder(own_identity())
    path = runfile.write(a_run(folder=folder))
    kept = [path.with_name("notes.txt"), path.with_name("0-1.json"), path.with_name("serve-x-y")]
    for other in kept:
        other.write_text("{}")
    assert runfile.sweep() == []
    assert all(other.exists() for other in (path, folder, *kept))
    assert runfile.find_live() == [a_run(folder=folder)]


def test_no_path_named_in_a_file_is_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    path = runfile.write(a_run(process=a_dead_process(), folder=precious))
    assert runfile.sweep() == [path]
    assert precious.exists()


def test_private_folders_are_private_and_distinct() -> None:
    first, second = (runfile.create_private_folder(own_identity()) for _ in range(2))
    assert first != second
    assert first.stat().st_mode & 0o777 == 0o700


def test_a_socket_path_that_would_be_too_long_moves(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = session / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    dead = a_dead_process()
    folder = runfile.create_private_folder(dead)
    assert folder.is_relative_to(session.parent / "tmp")
    assert len(str(folder / runfile.SOCKET_NAME)) <= runfile.SOCKET_PATH_BYTES
    assert runfile.sweep() == [folder]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"process": 1, "served_names": [], "folder": null}'])
def test_what_is_no_run_file_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        runfile.RunFile.parse(text)


def test_settings_take_the_servers_queue() -> None:
    runfile.write(replace(a_run(), key_prefix="other"))
    settings = runfile.connected(Settings())
    assert settings.redis_url == "unix:///somewhere/8000.sock"
    assert settings.key_prefix == "other"
    assert settings.model == "owner/some-model"
    assert settings.served_names == ("some-model", "owner/some-model")


def test_what_is_set_is_kept() -> None:
    runfile.write(a_run())
    mine = Settings(model="mine", key_prefix="mine")
    settings = runfile.connected(mine)
    assert (settings.model, settings.served_names, settings.key_prefix) == ("mine", ("mine",), "mine")
    given = Settings(redis_url="redis://elsewhere")
    assert runfile.connected(given) is given


def test_no_identity_of_a_process_that_is_gone() -> None:
    dead = a_dead_process()
    assert not dead.is_alive
    assert identity_of(dead.pid) != dead


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        identity = identity_of(child.pid)
        assert identity is not None
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked how
        assert not identity.is_alive
