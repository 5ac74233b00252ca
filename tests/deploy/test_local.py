from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from embedstream.consumer.cpu import thread_count
from embedstream.deploy import tending
from embedstream.shared import runfile
from embedstream.shared.processes import Identity, identity_of
from embedstream.shared.settings import Role, Settings

DEADLINE_S = 30.0

pytestmark = pytest.mark.integration


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)


class Serve:
    """A `serve` with fake roles in folders of its own."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        self.home = home
        self.fakes = home / "fakes"
        self.fakes.mkdir(exist_ok=True)
        self.err = home / "err"
        program = Path(__file__).with_name("fake_serve.py")
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(program), "--port", "0", "--consumers", "2", "--api-workers", "2", *arguments],
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env={**os.environ, **environment, "FAKE_DIR": str(self.fakes)},
                start_new_session=True,
            )

    def read_ready_block(self) -> list[str]:
        assert self.process.stdout is not None
        lines: list[str] = []
        while not (lines and lines[-1].startswith("curl ")):
            line = self.process.stdout.readline()
            assert line, f"serve ended early:\n{self.errors}"
            lines.append(line.rstrip("\n"))
        return lines

    @property
    def errors(self) -> str:
        return self.err.read_text()

    def pids(self, role: str) -> list[int]:
        """Of the processes of a role that run now."""
        found = [int(path.suffix[1:]) for path in self.fakes.glob(f"{role}.*")]
        return [pid for pid in found if identity_of(pid)]

    def valkey(self) -> Identity:
        """The embedded server: the child of serve whose command line names the private socket."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if str(self.run.folder).encode() in line:
                identity = identity_of(int(path.parent.name))
                assert identity is not None
                return identity
        raise AssertionError("no embedded server runs")

    @property
    def run(self) -> runfile.RunFile:
        return runfile.the_only_live()

    def given(self, role: str) -> list[dict[str, str]]:
        """The environments of the processes of a role that run now."""
        found: list[dict[str, str]] = [
            json.loads((self.fakes / f"{role}.{pid}").read_text()) for pid in self.pids(role)
        ]
        return found

    def everybody(self) -> list[Identity]:
        pids = [*self.pids("api"), *self.pids("consumer")]
        return [self.valkey(), *(identity for pid in pids if (identity := identity_of(pid)))]

    def leftovers(self) -> list[Path]:
        return [path for part in ("run", "tmp") for path in (self.home / part).glob("*/*")]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Starter = Callable[..., Serve]


@pytest.fixture
def start(home: Path) -> Iterator[Starter]:
    started: list[Serve] = []

    def starter(*arguments: str, **environment: str) -> Serve:
        started.append(Serve(home, *arguments, **environment))
        return started[-1]

    yield starter
    for serve in started:
        serve.close()


def test_ready_means_a_request_works(start: Starter) -> None:
    serve = start("--api-key", "secret", "--host", "localhost")
    lines = serve.read_ready_block()
    run = serve.run
    assert run.http_url == f"http://localhost:{run.port}"
    words = shlex.split(lines[-1])
    assert words[:2] == ["curl", f"{run.http_url}/v1/embeddings"]
    assert json.loads(words[words.index("-d") + 1]) == {"model": "all-MiniLM-L6-v2", "input": "Hello, world"}
    assert '"Authorization: Bearer $EMBEDSTREAM_API_KEY"' in lines[-1]
    assert "2 API processes, 2 consumers" in "\n".join(lines)
    assert f"queue: {run.redis_url} (embedded Valkey)" in "\n".join(lines)
    assert runfile.is_embedded(run.redis_url)
    assert "secret" not in "\n".join(lines) + serve.errors
    assert "valkey.starting" in serve.errors
    assert "model.loading" in serve.errors
    assert run.process.pid == serve.process.pid
    with socket.create_connection(("localhost", run.port), timeout=DEADLINE_S) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_the_children_get_the_settings_but_no_key_on_a_command_line(start: Starter) -> None:
    serve = start("--api-key", "secret", "--model", "owner/name", EMBEDSTREAM_MAX_MODEL_LEN="77", EMBEDSTREAM_PROT="1")
    serve.read_ready_block()
    for role in ("api", "consumer"):
        wait_for(lambda role=role: len(serve.pids(role)) == 2, "both processes")  # type: ignore[misc]  # mypy, lambdas
        for pid in serve.pids(role):
            given = json.loads((serve.fakes / f"{role}.{pid}").read_text())
            assert given["EMBEDSTREAM_API_KEY"] == "secret"
            assert given["EMBEDSTREAM_MODEL"] == "owner/name"
            assert given["EMBEDSTREAM_MAX_MODEL_LEN"] == "77"
            assert given["EMBEDSTREAM_REDIS_URL"] == serve.run.redis_url
            assert given["EMBEDSTREAM_PORT"] == str(serve.run.port)
            assert "EMBEDSTREAM_PROT" not in given
            if role == "consumer":
                threads = str(thread_count(Settings(consumers=2)))
                assert given["EMBEDSTREAM_THREADS"] == given["OMP_NUM_THREADS"] == threads
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            assert role.encode() in line
            assert b"secret" not in b" ".join(line)


def test_the_real_command_names_the_role_and_no_path() -> None:
    assert tending.role_command(Role.API, 5)[1:] == ["-P", "-m", "embedstream.deploy", "api", "--fd", "5"]
    assert tending.role_command(Role.CONSUMER)[1:] == ["-P", "-m", "embedstream.deploy", "consumer"]


def test_progress_is_told_until_ready(start: Starter, home: Path) -> None:
    (home / "fakes").mkdir()
    (home / "fakes" / "loading").touch()
    serve = start()
    wait_for(lambda: "no consumer is alive" in serve.errors, "the reason why it is not ready")
    assert "serve.not_ready_yet" in serve.errors
    (home / "fakes" / "loading").unlink()
    serve.read_ready_block()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_a_stop_nothing_remains(start: Starter, number: signal.Signals) -> None:
    serve = start()
    serve.read_ready_block()
    wait_for(lambda: len(serve.everybody()) == 5, "all processes")
    everybody, port = serve.everybody(), serve.run.port
    assert serve.leftovers()
    serve.process.send_signal(number)
    assert serve.process.wait(DEADLINE_S) == 0
    assert not any(process.is_alive for process in everybody)
    assert serve.leftovers() == []
    assert (serve.fakes / "ends").read_text().split() == ["api", "api", "consumer", "consumer"]
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_stop_while_starting_leaves_nothing(start: Starter) -> None:
    for appears in ("valkey.starting", "model.loading"):
        serve = start()
        wait_for(lambda: appears in serve.errors, appears)  # noqa: B023 - called in this round
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(DEADLINE_S) == 0
        assert serve.leftovers() == []
        assert serve.pids("api") == serve.pids("consumer") == []


def test_after_a_sigkill_no_child_lives_and_the_next_start_sweeps(start: Starter) -> None:
    serve = start(FAKE_STUBBORN="api,consumer")
    serve.read_ready_block()
    wait_for(lambda: len(serve.everybody()) == 5, "all processes")
    everybody = serve.everybody()
    serve.process.kill()
    serve.process.wait(DEADLINE_S)
    wait_for(lambda: not any(process.is_alive for process in everybody), "the end of all children")
    old = set(serve.leftovers())
    assert len(old) == 3  # the run file and the private folders of Valkey and of the metrics
    assert runfile.find_live() == []
    again = start()
    again.read_ready_block()
    assert not old & set(again.leftovers())
    assert len(again.leftovers()) == 3


def test_a_child_that_does_not_stop_is_killed(start: Starter) -> None:
    serve = start("--shutdown-timeout-s", "0.2", FAKE_STUBBORN="consumer")
    serve.read_ready_block()
    wait_for(lambda: len(serve.everybody()) == 5, "all processes")
    everybody = serve.everybody()
    serve.process.terminate()
    assert serve.process.wait(DEADLINE_S) == 0
    assert not any(process.is_alive for process in everybody)
    assert "did not stop in time" in serve.errors
    assert serve.leftovers() == []


def test_a_second_signal_kills_at_once(start: Starter) -> None:
    serve = start("--shutdown-timeout-s", "3600", FAKE_STUBBORN="api,consumer")
    serve.read_ready_block()
    wait_for(lambda: len(serve.everybody()) == 5, "all processes")
    everybody = serve.everybody()
    serve.process.terminate()
    wait_for(lambda: "serve.stopping" in serve.errors, "the stop")
    time.sleep(0.3)  # closer together they would count as one
    serve.process.send_signal(signal.SIGINT)
    serve.process.wait(DEADLINE_S)
    assert not any(process.is_alive for process in everybody)
    assert serve.leftovers() == []


def test_a_stop_refuses_new_clients(start: Starter) -> None:
    serve = start("--shutdown-timeout-s", "3600", FAKE_STUBBORN="consumer")
    serve.read_ready_block()
    wait_for(lambda: len(serve.everybody()) == 5, "all processes")
    address = ("127.0.0.1", serve.run.port)
    serve.process.terminate()
    wait_for(lambda: not serve.pids("api"), "the end of the API")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)
    time.sleep(0.3)  # closer together they would count as one
    serve.process.terminate()
    serve.process.wait(DEADLINE_S)


@pytest.mark.parametrize("role", ["api", "consumer"])
def test_a_dying_child_is_started_again(start: Starter, role: str) -> None:
    serve = start()
    serve.read_ready_block()
    for _ in range(2):  # at once, and after a pause
        wait_for(lambda: len(serve.pids(role)) == 2, "both processes")
        victim = serve.pids(role)[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(serve.pids(role)) == 2 and victim not in serve.pids(role), "a new process")  # noqa: B023
    assert "killed by SIGKILL" in serve.errors


def test_all_children_share_a_metrics_folder_and_each_has_a_name_in_it(start: Starter) -> None:
    serve = start("--redis-url", "unix:///of/somebody/else", PROMETHEUS_MULTIPROC_DIR="/of/the/user")
    serve.read_ready_block()
    wait_for(lambda: len(serve.pids("api") + serve.pids("consumer")) == 4, "all processes")
    given = serve.given("api") + serve.given("consumer")
    (folder,) = {Path(environment["PROMETHEUS_MULTIPROC_DIR"]) for environment in given}
    assert folder in serve.leftovers()
    assert folder.stat().st_mode & 0o777 == 0o700
    names = {"api-1", "api-2", "consumer-1", "consumer-2"}
    assert {environment["PROMETHEUS_MULTIPROC_PROCESS"] for environment in given} == names
    assert {path.name for path in folder.iterdir()} == {f"gauge_livesum_{name}.db" for name in names}
    serve.process.terminate()
    assert serve.process.wait(DEADLINE_S) == 0
    assert serve.leftovers() == []


def test_the_live_gauges_of_a_dead_child_go_and_its_name_stays(start: Starter) -> None:
    serve = start(FAKE_FINAL="api", FAKE_SPARED="api-1")
    wait_for(lambda: "process.cannot_run" in serve.errors, "the end of the other API process")
    serve.read_ready_block()
    (given,) = serve.given("api")
    assert given["PROMETHEUS_MULTIPROC_PROCESS"] == "api-1"
    folder = Path(given["PROMETHEUS_MULTIPROC_DIR"])
    wait_for(lambda: not (folder / "gauge_livesum_api-2.db").exists(), "the end of its gauges")
    assert (folder / "gauge_livesum_api-1.db").exists()
    os.kill(serve.pids("api")[0], signal.SIGKILL)
    wait_for(lambda: len(serve.given("api")) == 1, "a new process")
    assert serve.given("api") == [given]


def test_consumers_of_a_serve_get_no_metrics_port(start: Starter) -> None:
    serve = start(EMBEDSTREAM_METRICS_PORT="9100")
    serve.read_ready_block()
    wait_for(lambda: len(serve.pids("consumer")) == 2, "both processes")
    assert not any("EMBEDSTREAM_METRICS_PORT" in environment for environment in serve.given("consumer"))
    assert "serve.metrics_port_unused" in serve.errors


@pytest.mark.parametrize("durable", [False, True])
def test_valkey_comes_back_on_the_same_socket(start: Starter, home: Path, durable: bool) -> None:
    import redis

    serve = start(*(["--data-dir", str(home / "data")] if durable else []))
    serve.read_ready_block()
    url, first = serve.run.redis_url, serve.valkey()
    with closing(redis.Redis.from_url(url)) as client:
        client.set("key", "value")
        client.config_set("appendfsync", "always")
        client.set("key", "value2")
    os.kill(first.pid, signal.SIGKILL)

    def answers() -> bool:
        with closing(redis.Redis.from_url(url)) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    wait_for(lambda: not first.is_alive and answers(), "the new server")
    with closing(redis.Redis.from_url(url)) as client:
        assert client.get("key") == (b"value2" if durable else None)


def test_all_consumers_final_ends_serve(start: Starter) -> None:
    serve = start(FAKE_FINAL="consumer")
    assert serve.process.wait(DEADLINE_S) == 78
    assert "the consumer has its reason" in serve.errors
    assert "process.cannot_run" in serve.errors
    assert len(list(serve.fakes.glob("consumer.*"))) == 2  # neither was started again
    assert serve.leftovers() == []
    assert serve.pids("api") == []


def test_without_consumers_serve_waits_for_others(start: Starter) -> None:
    serve = start("--consumers", "0")
    assert "0 consumers" in "\n".join(serve.read_ready_block())


def test_each_gpu_gets_a_consumer(start: Starter, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: One (UUID: GPU-aa)'\necho 'GPU 1: Another (UUID: GPU-bb)'\n")
    program.chmod(0o755)
    build = tmp_path / "torch-2.13.0.dist-info"  # one without CUDA is installed here
    build.mkdir()
    (build / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")

    serve = start("--consumers", "auto", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(tmp_path))

    assert "2 consumers" in "\n".join(serve.read_ready_block())
    wait_for(lambda: len(serve.pids("consumer")) == 2, "both processes")
    assert {given["CUDA_VISIBLE_DEVICES"] for given in serve.given("consumer")} == {"GPU-aa", "GPU-bb"}
    assert "consumers.placed" in serve.errors


def test_a_taken_port_is_one_line(start: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        serve = start("--port", str(port))
        assert serve.process.wait(DEADLINE_S) == 69
        assert serve.errors.startswith(f"embedstream: port {port} of 127.0.0.1 is taken")
        assert len(serve.errors.splitlines()) == 1


def test_two_serves_on_one_data_folder(start: Starter, home: Path) -> None:
    first = start("--data-dir", str(home / "data"))
    first.read_ready_block()
    second = start("--data-dir", str(home / "data"))
    assert second.process.wait(DEADLINE_S) == 69
    assert "in use by another `embedstream serve`" in second.errors
    assert first.process.poll() is None
    assert len(first.leftovers()) == 3  # those of the first


def test_a_redis_of_somebody_else_is_used_and_left_alone(start: Starter) -> None:
    first = start()
    first.read_ready_block()
    url = first.run.redis_url
    second = start("--redis-url", url)
    second.read_ready_block()
    runs = runfile.find_live()
    assert sorted(run.folder is None for run in runs) == [False, True]
    second.process.terminate()
    assert second.process.wait(DEADLINE_S) == 0
    assert first.run.redis_url == url
    assert first.valkey().is_alive
