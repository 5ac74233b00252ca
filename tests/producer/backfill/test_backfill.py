"""One backfill put together, against a real Valkey and a stub consumer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from qdrant_client import QdrantClient

from embedstream.producer import Lane, Options, Producer, VectorType
from embedstream.producer.backfill.backfill import Outcome, backfill, finished_already
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.progress import Progress
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import InvalidInput, Misconfigured, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.options import VectorOptions
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

pytestmark = pytest.mark.integration


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        yield producer


@pytest.fixture
def options(tmp_path: Path) -> BackfillOptions:
    """40 rows: some equal, one without a text, one too long."""
    texts: list[str | None] = [f"a {number % 25}" for number in range(40)]
    texts[7], texts[30] = None, "long " * 30
    table = pa.table({"key": [f"k{number}" for number in range(40)], "text": texts, "year": list(range(40))})
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 13), tmp_path / "in" / "a.parquet")
    pq.write_table(table.slice(13), tmp_path / "in" / "b.parquet")
    return BackfillOptions(
        InputOptions(str(tmp_path / "in"), id_column="key", carry=("year",)),
        OutputOptions(str(tmp_path / "out")),
        Options(lane=Lane.BULK, partial=True),
        part_rows=10,
    )


Run = Callable[..., Awaitable[Outcome]]


@pytest.fixture
def run(producer: Producer, options: BackfillOptions) -> Run:
    def run(given: BackfillOptions = options, progress: Progress | None = None) -> Awaitable[Outcome]:
        return backfill(producer, given, progress or Progress(), asyncio.Event())

    return run


def expected(card: ModelCard, texts: list[str]) -> Any:
    tokens = TextTokenizer(card.tokenizer, card.recipe).encode(texts)
    sums = [ids.sum() % 977 for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    return np.stack([np.arange(1, 5) * (1.0 + total) for total in sums]).astype(np.float32)


async def test_from_files_to_parts(
    run: Run, stub: Any, card: ModelCard, options: BackfillOptions, tmp_path: Path
) -> None:
    progress = Progress()
    outcome = await run(progress=progress)
    assert (outcome.complete, outcome.rows, outcome.bad_rows) == (True, 38, 2)
    table = ds.dataset(tmp_path / "out").to_table()
    good = [number for number in range(40) if number not in (7, 30)]
    assert table.column_names == ["key", "year", "embedding"]
    assert table.column("key").to_pylist() == [f"k{number}" for number in good]
    vectors = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(-1, 4)
    np.testing.assert_array_equal(vectors, expected(card, [f"a {number % 25}" for number in good]))
    assert sum(job.n_inputs for job in stub.seen) == 25
    told = [json.loads(line) for line in outcome.side_file.read_text().splitlines()]
    assert [(Path(bad["file"]).name, bad["row"], bad["reason"], bad["id"]) for bad in told] == [
        ("a.parquet", 7, "null", "k7"),
        ("b.parquet", 17, "too_long", "k30"),
    ]
    assert (progress.total_rows, progress.rows, progress.bad_rows, progress.computed_texts) == (40, 40, 2, 25)


async def test_the_output_says_what_made_it(run: Run, stub: Any, card: ModelCard, tmp_path: Path) -> None:
    await run()
    about = pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).metadata
    said = {key.decode().removeprefix("embedstream."): value.decode() for key, value in about.items()}
    assert said["model"] == "m"
    assert said["revision"] == "r"
    assert said["fingerprint"] == card.fingerprint.hex()
    assert (said["dtype"], said["compute_dtype"], said["prompt"]) == ("float32", "float32", "")
    assert json.loads(said["recipe"])["pooling"] == "mean"


async def test_rows_of_text_are_estimated(run: Run, stub: Any, options: BackfillOptions, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    await asyncio.to_thread(file.write_text, "".join(f"a {number}\n" for number in range(200)))
    progress = Progress()
    await run(replace(options, input=InputOptions(str(file)), part_rows=50), progress)
    assert (progress.total_rows, progress.total_is_exact, progress.rows) == (200, False, 200)


async def test_again_is_done_without_anybody(run: Run, stub: Any, options: BackfillOptions) -> None:
    first = await run()
    stub.seen.clear()
    assert await run() == first == finished_already(options)
    assert stub.seen == []


async def test_bad_rows_of_an_earlier_run_are_counted_like_its_rows(
    run: Run, stub: Any, options: BackfillOptions, tmp_path: Path
) -> None:
    await run()
    (tmp_path / "out.backfill" / "complete.json").unlink()
    progress = Progress()
    await run(options, progress)
    assert (progress.resumed_rows, progress.bad_rows) == (40, 2)


@pytest.mark.parametrize("pattern", ["", "/*"])
@pytest.mark.parametrize("out", ["out", "out.parquet", "out.npy", "deep/out"])
async def test_what_it_writes_within_its_input_is_none_of_the_input(
    run: Run, stub: Any, options: BackfillOptions, tmp_path: Path, out: str, pattern: str
) -> None:
    (tmp_path / "in" / "deep").mkdir()
    inside = replace(
        options,
        input=replace(options.input, path=f"{tmp_path}/in/deep/..{pattern}"),
        output=OutputOptions(f"{tmp_path}/in/./{out}"),
    )
    first = await run(inside)
    assert (first.complete, first.rows, first.bad_rows) == (True, 38, 2)
    assert await run(inside) == first
    assert await asyncio.to_thread(finished_already, inside) == first


async def test_half_vectors_of_fewer_components(
    run: Run, stub: Any, card: ModelCard, options: BackfillOptions, tmp_path: Path
) -> None:
    vectors = VectorOptions(dimensions=2, dtype=VectorType.FLOAT16)
    await run(replace(options, vectors=replace(options.vectors, vectors=vectors)))
    table = ds.dataset(tmp_path / "out").to_table()
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 2)
    row = table.column("embedding")[3].as_py()
    np.testing.assert_array_equal(np.array(row, np.float16), expected(card, ["a 3"])[0, :2].astype(np.float16))


@pytest.mark.parametrize(
    ("vectors", "named"),
    [
        (Options(prompt="nonsuch", partial=True), "nonsuch"),
        (Options(adapter="nonsuch", partial=True), "nonsuch"),
        (Options(vectors=VectorOptions(dimensions=99), partial=True), "99"),
    ],
    ids=["prompt", "adapter", "dimensions"],
)
async def test_what_the_model_does_not_do_is_refused_before_anything_is_written(
    run: Run, stub: Any, options: BackfillOptions, tmp_path: Path, vectors: Options, named: str
) -> None:
    with pytest.raises(InvalidInput, match=named):
        await run(replace(options, vectors=vectors))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.backfill").exists()


async def test_it_waits_for_the_first_consumer(
    run: Run, start_stub: Any, options: BackfillOptions, tmp_path: Path
) -> None:
    progress = Progress()
    task = asyncio.ensure_future(run(progress=progress))
    await asyncio.sleep(0.3)
    assert progress.state.startswith("waiting: ")
    assert not (tmp_path / "out.backfill").exists()
    await start_stub()
    assert (await task).complete


async def test_patience_with_an_empty_fleet_ends(run: Run, options: BackfillOptions) -> None:
    with pytest.raises(Unavailable):
        await run(replace(options, patience_s=0.1))


async def test_a_fleet_that_goes_away_is_waited_for_and_not_for_ever(
    run: Run, stub_consumers: Any, redis_url: str, keys: Keys, card: ModelCard, options: BackfillOptions, tmp_path: Path
) -> None:
    progress = Progress()
    async with stub_consumers(redis_url, keys) as start:
        stub = await start(card)
        stub.on_job = lambda job, parts: None  # it takes jobs and never answers
        task = asyncio.ensure_future(run(replace(options, patience_s=1.0), progress))
        while not stub.seen:
            await asyncio.sleep(0.05)
        assert progress.state == ""
    with pytest.raises(Unavailable, match="No consumer of `m` is alive"):
        await task
    assert progress.state == "waiting: No consumer of `m` is alive."
    async with stub_consumers(redis_url, keys) as start:
        await start(card)
        progress = Progress()
        assert (await run(progress=progress)).complete
        assert progress.state == ""
    assert ds.dataset(tmp_path / "out").count_rows() == 38


async def test_a_model_that_is_replaced_ends_it_and_the_old_one_goes_on(
    run: Run, stub: Any, card: ModelCard, options: BackfillOptions, tmp_path: Path
) -> None:
    new = ModelCard("m", card.recipe, card.tokenizer, "r2")
    answered = []

    def replace_after_two(job: Any, parts: Any) -> Any:
        answered.append(job)
        if len(answered) == 2:
            stub.card = new
        return parts

    stub.on_job = replace_after_two
    many = replace(options, window_bytes=1)  # each row a request of its own
    with pytest.raises(Misconfigured, match="another revision while"):
        await run(many)
    assert not any((tmp_path / "out").glob("*.parquet"))
    stub.card, stub.on_job = card, lambda job, parts: parts
    assert (await run(many)).rows == 38
    assert ds.dataset(tmp_path / "out").count_rows() == 38


async def test_a_database_that_cannot_be_used_is_remembered_by_no_state_folder(
    run: Run, stub: Any, card: ModelCard, options: BackfillOptions, tmp_path: Path
) -> None:
    def to(url: str) -> BackfillOptions:
        return replace(options, output=OutputOptions(url), state=tmp_path / "state")

    with pytest.raises(Misconfigured, match="three slashes"):
        await run(to("qdrant+file://qdrant/docs"))
    assert not (tmp_path / "state").exists()
    outcome = await run(to(f"qdrant+file://{tmp_path}/qdrant/docs?distance=dot"))
    assert (outcome.complete, outcome.rows) == (True, 38)
    with closing(QdrantClient(path=str(tmp_path / "qdrant"))) as client:
        points, _ = client.scroll("docs", limit=100, with_vectors=True)
    found = {point.payload["key"]: point.vector for point in points if point.payload is not None}
    assert len(found) == 38
    np.testing.assert_array_equal(found["k3"], expected(card, ["a 3"])[0])


async def test_one_file_is_joined_of_all_parts(
    run: Run, stub: Any, card: ModelCard, options: BackfillOptions, tmp_path: Path
) -> None:
    await run(replace(options, output=OutputOptions(str(tmp_path / "v.parquet"))))
    table = pq.read_table(tmp_path / "v.parquet")
    good = [number for number in range(40) if number not in (7, 30)]
    assert table.column("year").to_pylist() == good
    vectors = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(-1, 4)
    np.testing.assert_array_equal(vectors, expected(card, [f"a {number % 25}" for number in good]))
