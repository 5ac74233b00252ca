"""A backfill is seen by others while it runs, and remembered afterwards."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.producer import Lane, Options, Producer
from embedstream.producer.backfill import registry
from embedstream.producer.backfill.backfill import backfill
from embedstream.producer.backfill.beats import beats_at, beats_in
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.progress import Progress
from embedstream.producer.backfill.survey import survey
from embedstream.shared.connections import connect_sync
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration


async def test_it_is_seen_while_it_runs_and_remembered_afterwards(
    settings: Settings, redis_url: str, stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    options = BackfillOptions(
        InputOptions(str(tmp_path / "in.parquet")),
        OutputOptions(str(tmp_path / "out")),
        Options(lane=Lane.BULK, partial=True),
        command=("embedstream", "backfill"),
    )
    folder = tmp_path / "out.backfill"
    await stub.pause()
    with closing(connect_sync(redis_url)) as redis:
        async with Producer(settings=settings) as producer, asyncio.timeout(60):
            task = asyncio.create_task(backfill(producer, options, Progress(), asyncio.Event()))
            while not (heard := await asyncio.to_thread(beats_at, redis, settings.key_prefix)):
                await asyncio.sleep(0.01)
            assert set(beats_in(folder / "running")) == set(heard)
            (said,) = heard.values()
            assert (said.out, said.total) == (str(tmp_path / "out"), 2)
            assert registry.remembered() == [folder]
            stub.resume()
            await task
        assert beats_at(redis, settings.key_prefix) == beats_in(folder / "running") == {}
    told = survey(folder)
    assert told is not None
    assert (told.manifest.id, told.manifest.command, told.is_complete) == (said.id, ("embedstream", "backfill"), True)
