"""What a URL of Qdrant asks of the sink."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from embedstream.shared.errors import Misconfigured

DISTANCES = ("cosine", "dot", "euclid", "manhattan")


@dataclass(frozen=True, slots=True)
class QdrantUrl:
    """A server or a folder, and a collection.

    Args:
        server: `http://host:port`; empty for a folder.
        prefix: path of the server below its host, where it has one.
        folder: of the client's own local mode; None for a server.
        collection: its name.
        distance: asked for; None takes that of a collection that is there, else cosine.
    """

    server: str
    prefix: str | None
    folder: Path | None
    collection: str
    distance: str | None


def qdrant_url_of(url: str) -> QdrantUrl:
    """Read a URL.

    Raises:
        Misconfigured: a parameter is not known, has a value that there is not, or holds a key that belongs elsewhere.
    """
    parts = urlsplit(url)
    asked = parse_qs(parts.query)
    if parts.username or parts.password:
        raise Misconfigured("A key of Qdrant has no place in the URL: set the environment variable QDRANT_API_KEY.")
    distance = asked.pop("distance", [None])[-1]
    if distance is not None and distance not in DISTANCES:
        raise Misconfigured(f"The URL of Qdrant has distance={distance}; there are {', '.join(DISTANCES)}.")
    if asked:
        raise Misconfigured(f"The URL of Qdrant has `{next(iter(asked))}`, which is not known; there is `distance`.")
    above, _, collection = unquote(parts.path).rstrip("/").rpartition("/")
    protocol = parts.scheme.partition("+")[2]
    if protocol == "file":
        if parts.netloc:
            raise Misconfigured("A folder of Qdrant has three slashes: qdrant+file:///folder/collection.")
        return QdrantUrl("", None, Path(above or "/"), collection, distance)
    if not parts.hostname:
        raise Misconfigured("The URL of Qdrant names no host: qdrant+http://host:6333/collection.")
    return QdrantUrl(f"{protocol}://{parts.netloc}", above.strip("/") or None, None, collection, distance)
