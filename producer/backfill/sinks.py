"""Opening the sink of an output."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.types as pat

from embedstream.shared.errors import Misconfigured

from .arrow_format import ArrowFormat
from .file_sinks import FolderSink, SingleFileSink
from .jsonl_format import JsonlFormat
from .npy_format import NpyFormat
from .options import OutputOptions
from .outputs import FORMATS, Kind, Output, output_of
from .parquet_format import ParquetFormat
from .part_format import Format
from .places import LocalPlace, ObjectPlace, Place
from .sink import OutputSchema, Sink
from .staging import Staging

_FORMATS: Mapping[str, Format] = {
    "parquet": ParquetFormat(),
    "arrow": ArrowFormat(),
    "jsonl": JsonlFormat(),
    "jsonl.gz": JsonlFormat("gzip"),
    "jsonl.zst": JsonlFormat("zstd"),
    "npy": NpyFormat(),
}


def open_sink(options: OutputOptions, schema: OutputSchema, staging: Path) -> Sink:
    """Open what the vectors go to; it blocks.

    Args:
        options: where that is.
        schema: of the rows.
        staging: a private folder of this backfill on this machine, made if missing.

    Raises:
        Misconfigured: the output is not one, was made by somebody else, does not fit the rows, or needs a package that
            is not installed.
        Unavailable: a database does not answer, or the disk is full.
    """
    output = output_of(options)
    refuse_clash(options, schema.carried)
    schema = replace(schema, carried=_plain(schema.carried))
    folder = Staging(staging)
    if output.kind is Kind.PGVECTOR:
        return _pgvector(output, schema, folder)
    if output.kind is Kind.QDRANT:
        return _qdrant(output, schema, folder)
    form = _FORMATS[output.format]
    if output.kind is Kind.FOLDER:
        return FolderSink(_place(output, output.location), form, schema, folder, output.shown)
    stem = next(output.name.removesuffix(known) for known in FORMATS[output.format] if output.name.endswith(known))
    names = [*(f"{stem}{extension}" for extension in form.extensions[:-1]), output.name]
    around = str(Path(output.location).parent) if output.is_local else output.location.rpartition("/")[0]
    place = _place(output, around)
    return SingleFileSink(place, names, form, schema, folder, output.shown)


def try_output(options: OutputOptions, schema: OutputSchema) -> None:
    """Try a database that no backfill has written to yet; it blocks.

    What is wrong with a URL shows before a state folder remembers it: that would refuse the right one.

    Raises:
        Misconfigured, Unavailable: as `open_sink`.
    """
    if output_of(options).kind in {Kind.PGVECTOR, Kind.QDRANT}:
        with TemporaryDirectory() as staging:
            open_sink(options, schema, Path(staging)).close()


def refuse_clash(options: OutputOptions, carried: pa.Schema) -> None:
    """Refuse a carried column that is named as the vectors are, or of a type that the output's format does not have.

    Raises:
        Misconfigured: there is one.
    """
    if options.vector_column in carried.names:
        raise Misconfigured(
            f"A column `{options.vector_column}` is carried: give the vectors another name with --vector-column."
        )
    if (output := output_of(options)).kind in {Kind.FILE, Kind.FOLDER}:
        _try_columns(_FORMATS[output.format], _plain(carried))


def _try_columns(form: Format, carried: pa.Schema) -> None:
    for field in carried:
        columns = pa.schema([field.with_nullable(True)])
        with TemporaryDirectory() as folder:
            try:
                part = form.open(
                    [Path(folder, str(place)) for place, _ in enumerate(form.extensions)],
                    OutputSchema(columns, f"not {field.name}", 1, "float32", {}),
                )
                with closing(part):
                    part.write(pa.record_batch([pa.nulls(1, field.type)], columns), np.zeros((1, 1), np.float32))
            except pa.ArrowNotImplementedError as error:
                raise Misconfigured(
                    f"The column `{field.name}` cannot be written in the format of OUT ({error}): carry others, or "
                    "choose another format."
                ) from error


def _place(output: Output, folder: str) -> Place:
    if not output.is_local:
        return ObjectPlace(folder)
    path = Path(folder)
    return LocalPlace(path, path.absolute().parent if output.kind is Kind.FOLDER else path)


def _plain(carried: pa.Schema) -> pa.Schema:
    """Without dictionaries, which may differ between parts: a file of Arrow has one for all of it."""
    fields = [field.with_type(field.type.value_type) if pat.is_dictionary(field.type) else field for field in carried]
    return pa.schema(fields, carried.metadata)


def _pgvector(output: Output, schema: OutputSchema, staging: Staging) -> Sink:
    try:
        from .pgvector_sink import PgvectorSink
    except ImportError as error:
        raise _needs("pgvector", error) from None
    return PgvectorSink(output, schema, staging)


def _qdrant(output: Output, schema: OutputSchema, staging: Staging) -> Sink:
    try:
        from .qdrant_sink import QdrantSink
    except ImportError as error:
        raise _needs("qdrant", error) from None
    return QdrantSink(output, schema, staging)


def _needs(extra: str, error: ImportError) -> Misconfigured:
    return Misconfigured(
        f"This output needs packages that are not installed ({error}): `pip install '.[{extra}]'` in "
        "embedstream's folder"
    )
