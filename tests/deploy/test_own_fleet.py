from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.consumer import requirements
from embedstream.deploy.own_fleet import OwnFleet
from embedstream.deploy.signals import Signals
from embedstream.shared import runfile
from embedstream.shared.errors import Misconfigured, ModelLoadError
from embedstream.shared.processes import Identity, identity_of
from embedstream.shared.settings import Settings

from .fake_consumer import vector

DEADLINE_S = 60.0
PART_ROWS = 200

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("same_logging")]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)


class Backfill:
    """A backfill with fake consumers in folders of its own."""

    def __init__(self, home: Path, *arguments: str, rows: int = 400, **environment: str) -> None:
        self.home = home
        self.out = home / "out"
        self.fakes = home / "fakes"
        self.fakes.mkdir(exist_ok=True)
        self.texts = [f"{number % 2000 + 1} {number // 2000 + 1}" for number in range(rows)]
        source = home / "in.parquet"
        if not source.exists():
            pq.write_table(pa.table({"id": range(rows), "text": self.texts}), source)
        program = Path(__file__).with_name("fake_backfill.py")
        flags = [
            "--id-column",
            "id",
            "--part-rows",
            str(PART_ROWS),
            "--tokenizer-processes",
            "1",
            "--served-model-name",
        ]
        self.err = home / "err"
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(program), str(source), str(self.out), *flags, "fake", *arguments],
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env={**os.environ, **environment, "FAKE_DIR": str(self.fakes)},
                start_new_session=True,
            )

    @property
    def errors(self) -> str:
        return self.err.read_text()

    def ended(self) -> int:
        return self.process.wait(DEADLINE_S)

    def consumers(self) -> list[Identity]:
        """Those that run now."""
        found = (identity_of(int(path.suffix[1:])) for path in self.fakes.glob("consumer.*"))
        return [identity for identity in found if identity]

    def valkey(self) -> Identity:
        """The child of the backfill whose command line names a private socket."""
        mine = f"serve-{self.process.pid}-".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if mine in line:
                identity = identity_of(int(path.parent.name))
                assert identity is not None
                return identity
        raise AssertionError("no embedded server runs")

    def parts(self) -> int:
        return len(list(self.out.glob("part-*")))

    def leftovers(self) -> list[Path]:
        return [path for part in ("run", "tmp") for path in (self.home / part).glob("*/*")]

    def check(self) -> None:
        """Every row once, in order, with its vector."""
        table = pq.read_table(self.out)
        assert table.column("id").to_pylist() == list(range(len(self.texts)))
        vectors = np.stack(table.column("embedding").to_numpy())
        assert np.array_equal(vectors, np.stack([vector(text) for text in self.texts]))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Starter = Callable[..., Backfill]


@pytest.fixture
def start(home: Path) -> Iterator[Starter]:
    started: list[Backfill] = []

    def starter(*arguments: str, **options: object) -> Backfill:
        started.append(Backfill(home, *arguments, **options))  # type: ignore[arg-type]  # rows, and the environment
        return started[-1]

    yield starter
    for backfill in started:
        backfill.close()


def test_it_brings_its_own_and_leaves_nothing(start: Starter) -> None:
    backfill = start("--consumers", "2")
    wait_for(lambda: len(backfill.consumers()) == 2, "two consumers")
    everybody = [backfill.valkey(), *backfill.consumers()]
    assert runfile.find_live() == []  # private: nobody else may join what goes away
    assert backfill.ended() == 0, backfill.errors
    backfill.check()
    assert not any(process.is_alive for process in everybody)
    assert backfill.leftovers() == []
    assert backfill.process.stdout is not None
    assert f"400 rows in {backfill.out} · no bad rows · " in backfill.process.stdout.read()
    assert "a word from the consumer" in backfill.errors


def test_deaths_of_consumer_and_valkey_cost_no_row(start: Starter) -> None:
    backfill = start(rows=4000, FAKE_DELAY_S="0.2")
    wait_for(lambda: backfill.parts() >= 1, "a part")
    (victim,) = backfill.consumers()
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: not victim.is_alive and backfill.consumers(), "a new consumer")
    done = backfill.parts()
    assert done < 20
    wait_for(lambda: backfill.parts() > done, "another part")
    valkey = backfill.valkey()
    os.kill(valkey.pid, signal.SIGKILL)
    assert backfill.ended() == 0, backfill.errors
    backfill.check()
    assert backfill.errors.count("killed by SIGKILL") == 2


def test_whatever_ends_it_the_same_command_goes_on(start: Starter) -> None:
    backfill = start(rows=6000, FAKE_DELAY_S="0.2")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        done = backfill.parts()
        wait_for(lambda: backfill.parts() > done, "another part")  # noqa: B023 - called in this round
        everybody = [backfill.valkey(), *backfill.consumers()]
        backfill.process.send_signal(number)
        assert backfill.ended() == code
        if number is signal.SIGKILL:
            wait_for(lambda: not any(process.is_alive for process in everybody), "the end of all children")  # noqa: B023 - as above
            assert backfill.leftovers()
        else:
            assert not any(process.is_alive for process in everybody)
            assert backfill.leftovers() == []
            assert "parts under way are finished first" in backfill.errors
            assert "The same command goes on" in backfill.errors
        assert "Traceback" not in backfill.errors
        assert backfill.parts() < 30
        backfill = start(rows=6000, FAKE_DELAY_S="0.2")
        wait_for(lambda: "rows are done already" in backfill.errors, "the words of going on")  # noqa: B023 - as above
    assert backfill.ended() == 0, backfill.errors
    backfill.check()
    assert backfill.leftovers() == []  # also those of the killed one
    again = start("--model", "nosuch")
    assert again.ended() == 0, again.errors  # all is done: nobody looks for the model
    assert "6,000 rows in " in again.process.stdout.read()  # type: ignore[union-attr]  # it is a pipe


def test_a_second_stop_is_at_once(start: Starter) -> None:
    backfill = start(rows=2000, FAKE_DELAY_S="30")
    wait_for(lambda: backfill.consumers() and list(backfill.home.glob("out.backfill/manifest.json")), "the work")
    time.sleep(0.5)
    backfill.process.send_signal(signal.SIGINT)
    wait_for(lambda: "parts under way" in backfill.errors, "the first stop")
    time.sleep(0.3)  # closer together they would count as one
    backfill.process.send_signal(signal.SIGINT)
    assert backfill.ended() == 130
    assert backfill.consumers() == []
    assert backfill.leftovers() == []
    assert "did not stop in time" not in backfill.errors


def test_a_model_that_cannot_be_served_is_one_line_and_one_event(start: Starter) -> None:
    backfill = start("--json", FAKE_FINAL="1")
    assert backfill.ended() == 78
    assert backfill.errors == "embedstream: the model has its reason\n"
    assert backfill.leftovers() == []
    *_, last = (json.loads(line) for line in backfill.process.stdout or ())
    assert last.pop("elapsed_s") > 0
    assert last == {
        "event": "failed",
        "error": "ModelLoadError",
        "message": "the model has its reason",
        "exit_code": 78,
    }


def test_what_cannot_work_is_told_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Signals() as signals:
        with pytest.raises(ModelLoadError, match="no model 'nosuch'"):
            OwnFleet(Settings(model="nosuch"), signals)
        with pytest.raises(Misconfigured, match="--consumers 0"):
            OwnFleet(Settings(consumers=0), signals)
        with pytest.raises(Misconfigured, match="/no/file"):
            OwnFleet(Settings(chat_template=Path("/no/file")), signals)
        monkeypatch.setattr(requirements, "_PACKAGES", ("torch_that_is_missing",))
        with pytest.raises(Misconfigured, match=r"torch_that_is_missing not installed.*\[consumer\]"):
            OwnFleet(Settings(), signals)
