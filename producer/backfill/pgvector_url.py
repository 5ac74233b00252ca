"""What a URL of PostgreSQL asks of the sink."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

from embedstream.shared.errors import Misconfigured

_INDEXES = ("none", "hnsw")
_DISTANCES = ("cosine", "l2", "ip")


@dataclass(frozen=True, slots=True)
class PgvectorUrl:
    """A database, a table, and what is built on it.

    Args:
        conninfo: the URL as libpq takes it.
        table: its name; with its schema before it, where one was given.
        index: `none` or `hnsw`, built when every row is there.
        distance: `cosine`, `l2` or `ip` (inner product): what the index is for.
    """

    conninfo: str
    table: tuple[str, ...]
    index: str
    distance: str


def pgvector_url_of(url: str) -> PgvectorUrl:
    """Take our own parameters out of a URL; the others are libpq's.

    Raises:
        Misconfigured: a parameter has a value that there is not.
    """
    parts = urlsplit(url)
    theirs = []
    ours = {"table": "", "index": "none", "distance": "cosine"}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in ours:
            ours[name] = value
        else:
            theirs.append((name, value))
    for name, known in (("index", _INDEXES), ("distance", _DISTANCES)):
        if ours[name] not in known:
            raise Misconfigured(f"The URL of PostgreSQL has {name}={ours[name]}; there are {', '.join(known)}.")
    table = tuple(ours["table"].split("."))
    if len(table) > 2 or not all(table):
        raise Misconfigured(f"The URL of PostgreSQL has table={ours['table']}: a table, or schema.table.")
    # Not by `urlunsplit`: it leaves out the `//` of a URL without a host, as sockets have it.
    base = url.partition("?")[0]
    query = urlencode(theirs)
    return PgvectorUrl(f"{base}?{query}" if query else base, table, ours["index"], ours["distance"])
