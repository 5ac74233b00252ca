"""What a backfill is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embedstream.producer.request import Options


@dataclass(frozen=True, slots=True)
class InputOptions:
    """What is read, and how.

    Args:
        path: a file, a directory, a glob, or a URL that fsspec knows.
        format: `parquet`, `jsonl`, `csv`, `text`, `arrow` or `dataset` (Hugging Face, on disk); None tells by the
            names of the files.
        text_columns: where the texts are; several need a template.
        template: Python format string of the columns' names, such as `{title}: {body}`; None for the one text column.
        id_column: carried under its own name and named in the side file; None counts rows.
        carry: other columns to carry; `("*",)` for all of them but the text columns.
        where: a condition in SQL; rows without it are left out.
    """

    path: str
    format: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    template: str | None = None
    id_column: str | None = None
    carry: tuple[str, ...] = ()
    where: str | None = None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where the vectors go.

    Args:
        path: a folder of parts, one file by its extension (`.parquet`, `.arrow`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst`,
            `.npy`), `postgresql://…` or `qdrant+http://…`.
        format: of the parts of a folder, `parquet` unless told otherwise.
        vector_column: name of the vector's column.
    """

    path: str
    format: str | None = None
    vector_column: str = "embedding"


@dataclass(frozen=True, slots=True)
class BackfillOptions:
    """All of a backfill.

    Args:
        input: what is read.
        output: where the vectors go.
        vectors: how the texts are embedded; on the bulk lane, rows that fail alone leaving the others their vectors.
        part_rows: rows of the input in a part; 0 chooses by the size of a vector.
        window_bytes: most bytes of texts and columns that are embedded together.
        credit_s: how long an answer of the queue is to take.
        patience_s: how long to wait for a consumer, or for Redis, before giving up.
        tokenizer_processes: processes that tokenise; 0 chooses by the number of cores.
        command: what was typed, to say how to go on; empty for a program of its own.
        state: folder for what the backfill remembers; None takes `OUT.backfill`.
    """

    input: InputOptions
    output: OutputOptions
    vectors: Options
    part_rows: int = 0
    window_bytes: int = 32 * 1024 * 1024
    credit_s: float = 2.0
    patience_s: float = 600.0
    tokenizer_processes: int = 0
    command: tuple[str, ...] = ()
    state: Path | None = None
