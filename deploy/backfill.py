"""The flags of `embedstream backfill`: what is read, what is made of it, and where it goes. Light to import."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from embedstream.shared import exits
from embedstream.shared.settings import Settings

_PACKAGES = ("duckdb", "fsspec", "pyarrow")


class VectorDtype(StrEnum):
    """Number formats that files and databases of vectors have."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


def backfill(
    settings: Settings,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A file, a directory, a glob in quotes, or a URL: Parquet, JSON lines, CSV, text, Arrow, or a dataset "
            "of Hugging Face on disk.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="A folder for Parquet parts, or one file by its extension, or the URL of a database.",
            show_default=False,
        ),
    ],
    text_column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Column of the texts; repeat for several, with a template. Default: text."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="TEXT", help="How one text is made of columns, such as '{title}: {body}'.")
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column that names a row, carried under its name. Default: file and row."),
    ] = None,
    carry: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another column to carry; repeat for several, '*' for all but the texts."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Condition; rows that do not meet it are left out.")
    ] = None,
    input_format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Format of the input. Default: as its names say.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option(metavar="NAME", help="Format of the parts of a folder. Default: parquet.")
    ] = None,
    vector_column: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the column of the vectors.")
    ] = "embedding",
    vector_dtype: Annotated[
        VectorDtype, typer.Option(help="Number format of the vectors, on the queue and in the output.")
    ] = VectorDtype.FLOAT32,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long; else their rows count as bad.")
    ] = False,
    dimensions: Annotated[
        int | None, typer.Option(min=1, metavar="INTEGER", help="Length of the vectors, where the model allows it.")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Scale to unit length. Default: as the model says."),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Prompt of the model to put before the texts, '' for none. Default: the model's.")
    ] = None,
    input_type: Annotated[
        str | None, typer.Option(help="What the texts are, query or document: the model's prompt and adapter for them.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Adapter of the model. Default: that of the input type.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for what is remembered, to go on. Default: OUT.backfill; for databases and object stores in "
            "the working folder.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress as one JSON object a line on stdout, in place of words on stderr.")
    ] = False,
) -> int:
    """Embed the rows of files, exactly resumable: the same command again goes on where one ended.

    It joins the queue at --redis-url, or the server that runs on this machine; without any it brings consumers of its
    own. Rows that cannot be embedded are left out and told in a side file; it then ends with 65.
    """
    if code := _complain_if_missing():
        return code
    from embedstream.producer.arguments import options_of
    from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions

    from .backfill_run import run

    vectors = options_of(
        dimensions=dimensions,
        normalize=normalize,
        dtype=vector_dtype.value,
        truncate_prompt_tokens=-1 if truncate else None,
        lane="bulk",
        timeout_s=settings.request_timeout_s if "request_timeout_s" in settings.model_fields_set else None,
        long_inputs=settings.long_inputs,
        prompt_name=prompt_name,
        input_type=input_type,
        task=task,
    )
    options = BackfillOptions(
        InputOptions(
            source, input_format, tuple(text_column or ["text"]), template, id_column, tuple(carry or ()), where
        ),
        OutputOptions(target, output_format, vector_column),
        vectors,
        settings.part_rows,
        settings.window_bytes,
        settings.credit_s,
        settings.patience_s,
        settings.tokenizer_processes,
        command=("embedstream", *sys.argv[1:]),
        state=state,
    )
    return run(settings, options, as_json=as_json)


def _complain_if_missing() -> int:
    names = [name for name in _PACKAGES if find_spec(name) is None]
    if not names:
        return exits.OK
    how = "`pip install '.[bulk]'` in embedstream's folder"
    exits.complain(f"{', '.join(names)} not installed; a backfill needs {how}")
    return exits.FINAL
