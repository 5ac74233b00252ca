"""The collection of a sink: made where it is missing, checked where it is there, and filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from embedstream.shared.errors import Misconfigured

from .qdrant_url import QdrantUrl
from .same_model import require_same_model
from .sink import OutputSchema

_CONFLICT = 409
_DISTANCES = {
    "cosine": models.Distance.COSINE,
    "dot": models.Distance.DOT,
    "euclid": models.Distance.EUCLID,
    "manhattan": models.Distance.MANHATTAN,
}


class QdrantCollection:
    """A collection.

    Args:
        url: names it.
        schema: of the rows.
    """

    def __init__(self, url: QdrantUrl, schema: OutputSchema) -> None:
        self._name = url.collection
        self._distance = url.distance
        self._schema = schema
        self._is_named = False

    def prepare(self, client: QdrantClient) -> None:
        """Make the collection, or check the one that is there.

        Raises:
            Misconfigured: it does not fit; the message says where.
        """
        if not client.collection_exists(self._name):
            self._create(client)
        config = client.get_collection(self._name).config
        self._is_named = isinstance(config.params.vectors, Mapping)
        self._check_vectors(config.params.vectors)
        require_same_model(f"The collection {self._name}", config.metadata or {}, self._schema.metadata)

    def upsert(
        self,
        client: QdrantClient,
        ids: list[Any],
        payloads: list[dict[str, Any]],
        vectors: list[list[float]],
    ) -> None:
        """Write points, and wait until they are durable.

        Args:
            client: of the server.
            ids: (points,) integers, or texts that are UUIDs.
            payloads: (points,) what stands beside the vector.
            vectors: (points, dimension).
        """
        named: Any = {self._schema.vector_column: vectors} if self._is_named else vectors
        # Not validated: that looks at each number, and takes longer than all else.
        points = models.Batch.model_construct(ids=ids, payloads=payloads, vectors=named)
        client.upsert(self._name, points, wait=True)

    def _create(self, client: QdrantClient) -> None:
        kind = models.Datatype.FLOAT16 if self._schema.dtype == "float16" else models.Datatype.FLOAT32
        distance = _DISTANCES[self._distance or "cosine"]
        params = models.VectorParams(size=self._schema.dimension, distance=distance, datatype=kind)
        try:
            client.create_collection(self._name, vectors_config=params, metadata=dict(self._schema.metadata))
        except UnexpectedResponse as error:
            if error.status_code != _CONFLICT:  # another process of this backfill was faster
                raise

    def _check_vectors(self, found: Any) -> None:
        where, name = f"The collection {self._name}", self._schema.vector_column
        if self._is_named:
            if name not in found:
                raise Misconfigured(f"{where} has vectors named {', '.join(found)}, and none named `{name}`.")
            found = found[name]
        if found is None or found.size != self._schema.dimension:
            size = None if found is None else found.size
            raise Misconfigured(
                f"{where} has vectors of {size} components, and these have {self._schema.dimension}: name another one."
            )
        if self._distance is not None and found.distance != _DISTANCES[self._distance]:
            raise Misconfigured(f"{where} compares by {found.distance.lower()}, and {self._distance} is asked for.")
