from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from embedstream.producer.backfill.claims import MOST_CHUNKS, MOST_SHARDS, Claims
from embedstream.producer.backfill.plan import PartId
from embedstream.shared.errors import Misconfigured

_OTHER = """
import sys
from pathlib import Path
from embedstream.producer.backfill.claims import Claims
from embedstream.producer.backfill.plan import PartId

claims = Claims(Path(sys.argv[1]))
for line in sys.stdin:
    word, shard, chunk = line.split()
    part = PartId(int(shard), int(chunk))
    print(claims.take(part) if word == "take" else claims.give_back(part), flush=True)
"""


class Other:
    """Another process that claims what it is told to."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, word: str, part: PartId) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word} {part.shard} {part.chunk}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "claims"


@pytest.fixture
def other(path: Path) -> Iterator[Other]:
    started = Other(path)
    yield started
    started.kill()


def test_a_part_has_one_process_at_a_time(path: Path, other: Other) -> None:
    part, neighbour = PartId(1, 5), PartId(1, 6)
    with closing(Claims(path)) as claims:
        assert claims.take(part)
        assert other.ask("take", part) == "False"
        assert other.ask("take", neighbour) == "True"
        assert not claims.take(neighbour)
        claims.give_back(part)
        assert other.ask("take", part) == "True"


def test_the_claims_of_a_dead_process_are_free(path: Path, other: Other) -> None:
    part = PartId(0, 0)
    assert other.ask("take", part) == "True"
    with closing(Claims(path)) as claims:
        assert not claims.take(part)
        other.kill()
        assert claims.take(part)


def test_closing_gives_everything_back(path: Path, other: Other) -> None:
    claims = Claims(path)
    assert claims.take(PartId(0, 0))
    claims.close()
    claims.close()
    assert other.ask("take", PartId(0, 0)) == "True"


def test_within_a_process_a_part_is_claimed_once(path: Path) -> None:
    with closing(Claims(path)) as claims:
        assert claims.take(PartId(0, 0))
        assert not claims.take(PartId(0, 0))
        claims.give_back(PartId(0, 0))
        claims.give_back(PartId(0, 0))
        assert claims.take(PartId(0, 0))


def test_a_process_opens_the_claims_of_a_folder_once(path: Path, other: Other) -> None:
    with closing(Claims(path)) as claims:
        assert claims.take(PartId(0, 0))
        with pytest.raises(Misconfigured, match="already works on"):
            Claims(path)
        assert other.ask("take", PartId(0, 0)) == "False"  # a second descriptor, closed, would have dropped the lock
    Claims(path).close()


def test_neighbouring_shards_do_not_share_a_byte(path: Path, other: Other) -> None:
    last, first = PartId(0, MOST_CHUNKS - 1), PartId(1, 0)
    with closing(Claims(path)) as claims:
        assert claims.take(last)
        assert claims.take(PartId(MOST_SHARDS - 1, MOST_CHUNKS - 1))
        assert other.ask("take", first) == "True"


@pytest.mark.parametrize("part", [PartId(0, MOST_CHUNKS), PartId(MOST_SHARDS, 0)])
def test_what_is_beyond_the_bounds_is_refused(path: Path, part: PartId) -> None:
    with closing(Claims(path)) as claims, pytest.raises(Misconfigured, match=r"more than 1000000? "):
        claims.take(part)


def test_a_file_system_without_locks_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with closing(Claims(path)) as claims:
        monkeypatch.setattr(fcntl, "lockf", refuse)
        with pytest.raises(Misconfigured, match=r"has no locks .*No locks available"):
            claims.take(PartId(0, 0))
