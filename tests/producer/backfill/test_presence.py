"""What a running backfill says of itself, and how state folders are remembered."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
import redis as redis_sync
from redis.asyncio import Redis

from embedstream.producer.backfill import registry
from embedstream.producer.backfill.beats import LASTS_S, Beat, beats_at, beats_in
from embedstream.producer.backfill.drafts import host_name
from embedstream.producer.backfill.manifest import manifest_of
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.presence import Presence
from embedstream.producer.backfill.progress import Progress
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.state import State
from embedstream.producer.request import Options
from embedstream.shared.connections import connect, connect_sync
from embedstream.shared.keys import backfills
from embedstream.shared.processes import own_identity


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    options = BackfillOptions(InputOptions("/in"), OutputOptions("/out"), Options())
    with closing(State(tmp_path / "state", manifest_of(options, (), pa.schema([("row", pa.int64())])))) as state:
        yield state


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_sync.Redis]:
    client = connect_sync(redis_url)
    yield client
    client.close()


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(look):
            await asyncio.sleep(0.01)


def beat(**changes: object) -> Beat:
    process = own_identity()
    fields = {"host": host_name(), "pid": process.pid, "started": process.started} | changes
    return Beat("id", "/out", taken=1, total=None, bad_rows=0, rows_per_s=1.5, doing="", **fields)  # type: ignore[arg-type] # of a test


async def test_a_running_process_is_seen_in_the_folder_and_in_redis(
    client: Redis, redis: redis_sync.Redis, prefix: str, state: State
) -> None:
    killed = beat(started=1)
    (state.beats / f"{killed.mark}.json").write_bytes(killed.encode())
    progress = Progress(total_rows=100, state="waiting: nobody is there")
    async with Presence(client, prefix, state, progress, "/out", every_s=0.02):
        assert not (state.beats / f"{killed.mark}.json").exists()
        await until(lambda: beats_at(redis, prefix))
        (said,) = beats_in(state.beats).values()
        assert (said.id, said.out, said.taken, said.total) == (state.manifest.id, "/out", 0, 100)
        assert (said.host, said.pid, said.doing) == (host_name(), os.getpid(), "waiting: nobody is there")
        await asyncio.to_thread(state.commit, PartRecord(PartId(0, 0), 10, 8, 1, 1, 2))

        def both() -> bool:
            beats = [*beats_at(redis, prefix).values(), *beats_in(state.beats).values()]
            return [(beat.taken, beat.bad_rows) for beat in beats] == [(10, 2)] * 2

        await until(both)
        assert 0 < redis.ttl(backfills(prefix)) <= LASTS_S
    assert beats_at(redis, prefix) == {}
    assert list(state.beats.iterdir()) == []


async def test_without_redis_the_folder_is_enough(state: State, prefix: str, tmp_path: Path) -> None:
    nobody = connect(f"unix://{tmp_path}/nobody.sock")
    async with Presence(nobody, prefix, state, Progress(), "/out", every_s=0.01):
        await until(lambda: beats_in(state.beats))
        await asyncio.to_thread(state.commit, PartRecord(PartId(0, 0), 10, 10, 1, 1))
        await until(lambda: [beat.taken for beat in beats_in(state.beats).values()] == [10])
    await nobody.aclose()


def test_the_dead_are_not_seen_in_the_folder(tmp_path: Path) -> None:
    living, dead = beat(), beat(started=1)
    near, far = beat(host="elsewhere"), beat(host="elsewhere", pid=2)
    for said in (living, dead, near, far):
        (tmp_path / f"{said.mark}.json").write_bytes(said.encode())
    os.utime(tmp_path / f"{far.mark}.json", (0, 0))
    (tmp_path / "other.json").write_text("[]")
    assert set(beats_in(tmp_path)) == {living.mark, near.mark}
    assert not (tmp_path / f"{dead.mark}.json").exists()
    assert beats_in(tmp_path / "missing") == {}


def test_the_dead_are_not_seen_in_redis(redis: redis_sync.Redis, prefix: str) -> None:
    living, dead = beat(), beat(pid=1)
    redis.hset(backfills(prefix), living.mark, living.encode(2**52))
    redis.hset(backfills(prefix), dead.mark, dead.encode(1))
    redis.hset(backfills(prefix), "newer", json.dumps({"until_ms": 2**52}))
    assert beats_at(redis, prefix) == {living.mark: living}
    assert redis.hkeys(backfills(prefix)) == [living.mark.encode(), b"newer"]


def test_state_folders_are_remembered_as_long_as_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert registry.remembered() == []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
        registry.remember(Path(name))
    registry.remember(tmp_path / "b")
    assert len(list(registry.registry_folder().iterdir())) == 2
    (registry.registry_folder() / "other.json").write_text("{")
    monkeypatch.chdir("/")
    assert sorted(registry.remembered()) == [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "a" / "manifest.json").unlink()
    assert registry.remembered() == [tmp_path / "b"]
    (tmp_path / "a" / "manifest.json").touch()
    assert registry.remembered() == [tmp_path / "b"]


def test_a_home_that_cannot_be_written_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    registry.remember(tmp_path)
    assert registry.remembered() == []
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert registry.registry_folder() == Path.home() / ".local" / "state" / "embedstream" / "backfills"
