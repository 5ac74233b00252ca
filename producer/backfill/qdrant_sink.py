"""A collection of Qdrant.

Qdrant has no transactions: while a part is delivered some of its points are there before others. Points are written by
ids that follow from the rows' ids, so a part that is written twice is there once.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa
import pyarrow.types as pat
from qdrant_client import QdrantClient
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from embedstream.shared.errors import InvalidInput, Misconfigured
from embedstream.shared.urls import without_secrets

from .arrow_format import ArrowFormat, arrow_batches
from .json_rows import dumps, json_rows
from .outputs import Output
from .plan import PartId
from .qdrant_collection import QdrantCollection
from .qdrant_url import QdrantUrl, qdrant_url_of
from .retries import patiently
from .sink import OutputSchema
from .staging import StagedPart, Staging

API_KEY = "QDRANT_API_KEY"
"""The environment variable of the key, the one that Qdrant's own tools read."""
BATCH_BYTES = 4 * 1024 * 1024
"""Of JSON in one request; a server takes 32 MiB unless told otherwise."""
_TIMEOUT_S = 60
_NUMBER_BYTES = 20
"""Of a component in JSON, at most about."""
_IDS = uuid.UUID("5e0c7a2e-9f0b-5d0e-8a7c-3b1f5f0a4d11")
"""The namespace of points whose rows have ids that Qdrant does not take."""

T = TypeVar("T")


@dataclass(slots=True)
class _Points:
    """What goes into one request."""

    ids: list[int | str] = field(default_factory=list)
    payloads: list[dict[str, Any]] = field(default_factory=list)
    vectors: list[list[float]] = field(default_factory=list)
    n_bytes: int = 0


class QdrantSink:
    """A collection.

    Args:
        output: names the server and the collection.
        schema: of the rows.
        staging: of this backfill: a part is written there first, and travels when it is whole.

    Raises:
        Misconfigured: there is no id column, the collection is there and does not fit, or the server refuses what is
            asked of it.
        Unavailable: it does not answer.
    """

    def __init__(self, output: Output, schema: OutputSchema, staging: Staging) -> None:
        if schema.id_column is None:
            raise Misconfigured(
                "A collection needs a column of ids, by which a row is written once: name it with --id-column."
            )
        self._id = schema.id_column
        self._schema = schema
        self._staging = staging
        self._where = f"the collection {output.name} of {output.shown.partition('?')[0]}"
        url = qdrant_url_of(output.location)
        self._collection = QdrantCollection(url, schema)
        self._client = _open(url, self._where)
        try:
            self._patiently(partial(self._collection.prepare, self._client))
        except BaseException:
            self._client.close()
            raise

    def begin(self, part: PartId) -> StagedPart:
        """Begin a part."""
        form = ArrowFormat()
        drafts = self._staging.drafts([f"part-{part.name}{form.extensions[0]}"])
        return StagedPart(form, self._schema, drafts, partial(self._deliver, drafts[0]), self._where)

    def finish(self, parts: Sequence[PartId]) -> None:
        """The points are there already."""

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _deliver(self, draft: Path) -> None:
        for batch in arrow_batches(draft):
            for points in self._points(batch):
                self._patiently(
                    partial(self._collection.upsert, self._client, points.ids, points.payloads, points.vectors)
                )
        draft.unlink()

    def _points(self, batch: pa.RecordBatch) -> Iterator[_Points]:
        """Cut a batch into requests."""
        ids = batch.column(self._id)
        if ids.null_count:
            raise InvalidInput(
                f"A row has no value in the id column `{self._id}`, and {self._where} needs one in each: leave those "
                "rows out by a condition on the input."
            )
        columns = pa.RecordBatch.from_arrays(batch.columns[:-1], schema=self._schema.carried)
        matrix = batch.columns[-1].flatten().to_numpy().reshape(-1, self._schema.dimension)
        points = _Points()
        for row, name, vector in zip(json_rows(columns), point_ids(ids), matrix, strict=True):
            payload = dumps(row)
            n_bytes = len(payload) + _NUMBER_BYTES * len(vector)
            if points.ids and points.n_bytes + n_bytes > BATCH_BYTES:
                yield points
                points = _Points()
            points.ids.append(name)
            points.payloads.append(orjson.loads(payload))
            points.vectors.append(vector.tolist())
            points.n_bytes += n_bytes
        if points.ids:
            yield points

    def _patiently(self, action: Callable[[], T]) -> T:
        """Do something on the server, again where it did not answer."""

        def act() -> T:
            try:
                return action()
            except UnexpectedResponse as error:
                if error.status_code is not None and error.status_code < 500 and error.status_code != 429:
                    raise Misconfigured(f"{self._where} refuses what is asked of it: {_told(error)}") from error
                raise

        return patiently(act, (ResponseHandlingException, UnexpectedResponse), self._where, _told)


def point_ids(ids: pa.Array) -> list[int | str]:
    """Ids of points: (rows,) unsigned integers and UUIDs as they are, for others a UUID that follows from them."""
    if pat.is_integer(ids.type):
        return [value if value >= 0 else _derived(str(value)) for value in ids.to_pylist()]
    named = json_rows(pa.record_batch([ids], names=["id"]))
    return [_point_id(row["id"]) for row in named]


def _point_id(value: Any) -> str:
    text = value if isinstance(value, str) else dumps(value).decode()
    try:
        known = uuid.UUID(text)
    except ValueError:
        return _derived(text)
    # Only as it is commonly written: other ways would make one point of two rows.
    return text if str(known) == text else _derived(text)


def _derived(text: str) -> str:
    return str(uuid.uuid5(_IDS, text))


def _open(url: QdrantUrl, where: str) -> QdrantClient:
    if url.folder is not None:
        try:
            # Its check of threads is for those who share it; a sink is used by one after the other.
            return QdrantClient(path=str(url.folder), force_disable_check_same_thread=True)
        except RuntimeError as error:
            raise Misconfigured(f"{where} is used by another process: several need a server of Qdrant.") from error
    key = os.environ.get(API_KEY)
    return QdrantClient(url=url.server, api_key=key, prefix=url.prefix, timeout=_TIMEOUT_S, check_compatibility=False)


def _told(error: Exception) -> str:
    """What a server says, in a line."""
    if isinstance(error, UnexpectedResponse):
        return f"{error.status_code} {error.reason_phrase}"
    lines = without_secrets(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
