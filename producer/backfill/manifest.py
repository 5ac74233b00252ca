"""The manifest: what a backfill is, written once when it begins, and held against what is asked for ever after."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from embedstream.producer.request import Options
from embedstream.shared.errors import Misconfigured
from embedstream.shared.urls import without_password

from .options import BackfillOptions, InputOptions, OutputOptions
from .plan import SHARD_BYTES, InputFile

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "manifest.json"
VERSION = 1
_SECRET_PARAMETER = re.compile(r"([?&][^=&]*(?:sig|signature|token|secret|key|credential)[^=&]*=)[^&#]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class VectorChoices:
    """What is asked of the vectors: the part of `Options` that decides their values."""

    dimensions: int | None
    normalize: bool | None
    dtype: str
    truncate_prompt_tokens: int | None
    add_special_tokens: bool
    long_inputs: str
    truncation_side: str
    prompt: str
    adapter: str

    @classmethod
    def of(cls, options: Options) -> Self:
        """Those of a request."""
        return cls(
            options.vectors.dimensions,
            options.vectors.normalize,
            options.vectors.dtype.value,
            options.truncate_prompt_tokens,
            options.add_special_tokens,
            options.long_inputs.name.lower(),
            options.truncation_side.name.lower(),
            options.prompt,
            options.adapter,
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backfill is.

    Args:
        input: what is read, and how; passwords are left out, here and wherever else a URL stands.
        files: of the input, as they were when it began.
        output: where the vectors go.
        vectors: what is asked of them.
        columns: names and types of the carried columns.
        model: what makes the vectors, as in the metadata of the output; empty while nobody has asked the fleet.
        part_rows: rows of the input in a part; 0 while that is not chosen.
        shard_bytes: how files are grouped in shards.
        command: what was typed, for the words that say how to go on; empty for a program of its own.
        folder: where it was typed.
        began: ISO 8601, UTC.
        id: tells it from all others.
    """

    input: InputOptions
    files: tuple[InputFile, ...]
    output: OutputOptions
    vectors: VectorChoices
    columns: tuple[tuple[str, str], ...]
    model: Mapping[str, str]
    part_rows: int
    shard_bytes: int = SHARD_BYTES
    command: tuple[str, ...] = ()
    folder: str = field(default_factory=lambda: str(Path.cwd()))
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def encode(self) -> bytes:
        """Its JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Manifest:
        """Read its JSON.

        Args:
            data: of the file.
            path: of the file, for messages.

        Raises:
            Misconfigured: it is damaged, or made by a version of embedstream that this one does not know.
        """
        try:
            fields = json.loads(data)
            version = int(fields.pop("version"))
            if version > VERSION:
                raise Misconfigured(
                    f"{path} was written by a newer embedstream (its form is {version}, and this one reads {VERSION}): "
                    "finish that backfill with the newer one."
                )
            return _made(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Misconfigured(
                f"{path} is damaged ({type(error).__name__}): bring it back from a copy, or remove {path.parent} and "
                "the output, to begin anew."
            ) from None


def manifest_of(
    options: BackfillOptions,
    files: Sequence[InputFile],
    carried: pa.Schema,
    model: Mapping[str, str] | None = None,
    part_rows: int = 0,
) -> Manifest:
    """The manifest of what is asked for.

    Args:
        options: all of it.
        files: of the input, as they are now.
        carried: the carried columns.
        model: what makes the vectors, where that is known.
        part_rows: rows of the input in a part, where that is chosen.
    """
    return Manifest(
        replace(options.input, path=_without_secrets(options.input.path)),
        tuple(files),
        replace(options.output, path=_lasting(options.output.path)),
        VectorChoices.of(options.vectors),
        tuple((column.name, str(column.type)) for column in carried),
        dict(model or {}),
        part_rows,
        command=tuple(map(_without_secrets, options.command)),
    )


def _without_secrets(text: str) -> str:
    """Less passwords, and what else lets somebody in who finds it in the query of a URL."""
    return _SECRET_PARAMETER.sub(r"\1***", without_password(text)) if "://" in text else text


def _lasting(path: str) -> str:
    """OUT, whatever the working folder is, and without a password."""
    if "://" in path:
        return _without_secrets(path)
    return str(Path(path).absolute()) + ("/" if path.endswith("/") else "")


def _made(fields: dict[str, Any]) -> Manifest:
    asked, output, vectors = fields.pop("input"), fields.pop("output"), fields.pop("vectors")
    return Manifest(
        input=InputOptions(**asked | {name: tuple(asked[name]) for name in ("text_columns", "carry")}),
        files=tuple(InputFile(**file) for file in fields.pop("files")),
        output=OutputOptions(**output),
        vectors=VectorChoices(**vectors),
        columns=tuple((str(name), str(kind)) for name, kind in fields.pop("columns")),
        command=tuple(map(str, fields.pop("command"))),
        **fields,
    )
