"""Guards of backfills taken out, by name, to see that the scenarios notice; in the way of `ablations`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from embedstream.producer.backfill import file_sinks, staging, state
from embedstream.producer.backfill.blocks import BadRow
from embedstream.producer.backfill.claims import Claims
from embedstream.producer.backfill.file_sinks import SingleFileSink
from embedstream.producer.backfill.places import Place
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.runner import Runner
from embedstream.producer.backfill.sink import PartWriter
from embedstream.producer.backfill.state import State

from .ablations import replace_in


def record_before_part() -> None:
    """The order of a commit: the record is written first, then the part."""

    def commit(self: Runner, writer: PartWriter | None, record: PartRecord, bad: Sequence[BadRow]) -> None:
        self._state.commit(record, bad)
        if writer is not None:
            writer.commit()

    replace_in(Runner, "_commit", commit)


def records_forgotten() -> None:
    """Skipping what is committed: each run does all of it."""

    def is_committed(self: State, part: PartId) -> bool:
        del self, part
        return False

    replace_in(State, "is_committed", is_committed)


def claims_of_everybody() -> None:
    """Claims: each process takes what it wants."""

    def take(self: Claims, part: PartId) -> bool:
        del self, part
        return True

    replace_in(Claims, "take", take)


def parts_are_added() -> None:
    """One name for a part, whoever writes it and how often: a part that is there gets another beside it."""

    def put(place: Place, drafts: Sequence[Path], names: Sequence[str]) -> None:
        there = set(place.names())
        for draft, name in zip(drafts, names, strict=True):
            place.put(draft, name if name not in there else name.replace(".", f"-{len(there)}.", 1))

    replace_in(file_sinks, "_put", put)


def no_sweep() -> None:
    """The sweep of what killed processes leave."""

    def sweep(folder: Path, name: str = "") -> None:
        del folder, name

    for module in (file_sinks, staging, state):
        replace_in(module, "sweep", sweep)


def joined_before_it_is() -> None:
    """The order of joining parts: what is joined is remembered first."""
    join = SingleFileSink._join

    def mark_and_join(self: SingleFileSink, parts: Sequence[PartId]) -> None:
        self._staging.set_mark("joined")
        join(self, parts)

    replace_in(SingleFileSink, "_join", mark_and_join)


def side_file_after_the_end() -> None:
    """The order of an end: the side file is brought up to date afterwards."""
    finish = State.finish

    def finish_first(self: State) -> None:
        write = self._side_file.write
        replace_in(self._side_file, "write", lambda: None)
        finish(self)
        replace_in(self._side_file, "write", write)
        self.write_side_file()

    replace_in(State, "finish", finish_first)


ABLATIONS: dict[str, Callable[[], None]] = {
    one.__name__: one
    for one in (
        record_before_part,
        records_forgotten,
        claims_of_everybody,
        parts_are_added,
        no_sweep,
        joined_before_it_is,
        side_file_after_the_end,
    )
}
