"""One backfill, put together: input, model, output and state made ready, checked against each other, and run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from embedstream.producer.client import Producer
from embedstream.producer.credit import Credit
from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import prepare
from embedstream.shared.errors import Misconfigured, StaleCard

from . import manifest as manifests
from .embedding import Embedding
from .manifest import manifest_of
from .metadata import metadata_of
from .options import BackfillOptions
from .outputs import output_of
from .plan import shards_of
from .presence import Presence
from .progress import Progress
from .registry import remember
from .runner import Runner
from .sink import OutputSchema
from .sinks import open_sink, refuse_clash, try_output
from .source import Source
from .sources import FileSource, open_source
from .state import State, paths_of
from .survey import Survey, finished, survey
from .tokenizing import Tokenizing
from .waiting import first_model, patiently

MOST_PART_ROWS = 16_384
PART_BYTES = 64 * 1024 * 1024
"""Of the vectors of a part: what a kill costs, and what is held of each of the parts under way."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a backfill ended.

    Args:
        complete: whether every part is committed and the output whole; else it was stopped.
        bad_rows: rows that were left out because they could not be embedded, of all processes and runs.
        rows: rows in the output, likewise.
        state: its state folder.
        side_file: where bad rows are told, if there are any.
    """

    complete: bool
    bad_rows: int
    rows: int
    state: Path
    side_file: Path


async def backfill(
    producer: Producer, options: BackfillOptions, progress: Progress, stopping: asyncio.Event
) -> Outcome:
    """Run a backfill, or go on with one.

    Args:
        producer: open, for the model.
        options: what is asked for.
        progress: counted as it goes.
        stopping: when it is set, parts under way are finished and no other is begun.

    Raises:
        Misconfigured: the options do not fit the input, the state folder belongs to another backfill, or the model was
            replaced while it ran.
        InvalidInput, NotServed: the model does not do what is asked of it.
        Unavailable: no consumer, or no Redis, for longer than the patience allows.
    """
    source = await asyncio.to_thread(_opened, options)
    refuse_clash(options.output, source.schema)  # before a state folder remembers it
    if found := await asyncio.to_thread(finished, options, source.files, source.schema):
        return _outcome(found)
    shards = tuple(shards_of(source.files))
    counts = [shard.n_rows for shard in shards]
    progress.total_rows, progress.total_is_exact = await asyncio.to_thread(source.estimated_rows), None not in counts
    served = await first_model(producer.fleet, progress, options.patience_s)
    await prepare(("a",), options.vectors, served)  # what the model does not do is refused before anything is written
    schema = _output_schema(source, served, options, producer)
    part_rows = options.part_rows or max(1, min(MOST_PART_ROWS, PART_BYTES // schema.row_bytes))
    manifest = manifest_of(options, source.files, source.schema, schema.metadata, part_rows)
    output = output_of(options.output)
    folder = options.state or output.state_folder
    if not (folder / manifests.NAME).exists():
        await asyncio.to_thread(try_output, options.output, schema)
    processes = options.tokenizer_processes or max(1, (os.cpu_count() or 2) // 2)
    options = replace(options, vectors=replace(options.vectors, timeout_s=options.vectors.timeout_s or 600.0))
    credit = Credit(options.credit_s, max(1, producer.max_undelivered_bytes // 2 // schema.row_bytes))
    with (
        closing(await asyncio.to_thread(State, folder, manifest, output)) as state,
        closing(
            await asyncio.to_thread(
                open_sink, options.output, replace(schema, metadata=state.manifest.model), folder / "staging"
            )
        ) as sink,
        closing(Tokenizing(served.card, options.vectors, processes)) as tokenizing,
    ):
        await asyncio.to_thread(remember, folder)
        records = state.records()
        progress.resumed_rows = sum(record.taken for record in records)
        progress.bad_rows = sum(record.bad_rows for record in records)
        progress.begin(state.manifest.part_rows)
        embedding = Embedding(producer, served.card, options.vectors, tokenizing, credit, progress, options.patience_s)
        runner = Runner(
            source,
            tuple(shards_of(source.files, state.manifest.shard_bytes)),
            sink,
            state,
            embedding,
            progress,
            part_rows=state.manifest.part_rows,
            window_bytes=options.window_bytes,
            id_column=options.input.id_column,
        )
        watch = asyncio.create_task(_stop(runner, stopping))
        try:
            async with Presence(producer.redis, served.keys.prefix, state, progress, output.shown):
                await patiently(runner.run(), producer.fleet, progress, options.patience_s)
        except StaleCard:
            raise Misconfigured(
                f"`{served.card.model}` was replaced by another revision while its vectors were made, and two kinds of "
                "vectors cannot be compared: serve the old revision again and repeat the command, or begin anew with "
                "another OUT."
            ) from None
        finally:
            watch.cancel()
            if not state.is_complete:  # else it is up to date, and whoever runs this again does nothing more
                await asyncio.to_thread(state.write_side_file)
    found = await asyncio.to_thread(survey, folder)
    if found is None:
        raise Misconfigured(f"{folder} was removed while its backfill ran: begin anew.")
    return _outcome(found)


def finished_already(options: BackfillOptions, models: Collection[str] = ()) -> Outcome | None:
    """How a backfill ended, where all of it is done: to say so takes no model and no server.

    Args:
        options: what is asked for.
        models: names of the model that is asked for; empty where any will do.

    Returns:
        None where there is something to do.

    Raises:
        Misconfigured: the options do not fit the input, or the state folder belongs to another backfill.
    """
    source = _opened(options)
    found = finished(options, source.files, source.schema, models)
    return None if found is None else _outcome(found)


def _opened(options: BackfillOptions) -> FileSource:
    output = output_of(options.output)
    return open_source(options.input, paths_of(options.state or output.state_folder, output))


def _outcome(found: Survey) -> Outcome:
    return Outcome(found.is_complete, found.bad_rows, found.rows, found.folder, found.side_file)


async def _stop(runner: Runner, stopping: asyncio.Event) -> None:
    await stopping.wait()
    runner.stop()


def _output_schema(source: Source, served: ServedModel, options: BackfillOptions, producer: Producer) -> OutputSchema:
    vectors = options.vectors.vectors
    return OutputSchema(
        source.schema,
        options.output.vector_column,
        vectors.dimensions or served.card.recipe.size(per_token=False),
        vectors.dtype.value,
        metadata_of(served.card, options.vectors, producer.fleet.consumers),
        options.input.id_column,
    )
