"""The keys file: its form, and what becomes of changes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import httpx2
import pytest
import structlog
from starlette.applications import Starlette
from tests.api.conftest import StubProducer

from embedstream.api import create_app, keys_file
from embedstream.api.context import Caller
from embedstream.api.keys import KeyRing
from embedstream.shared import metrics
from embedstream.shared.errors import Misconfigured
from embedstream.shared.lanes import Lane
from embedstream.shared.settings import Settings

Connect = Callable[[Starlette], httpx2.AsyncClient]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def write(path: Path, text: str) -> Path:
    """As operators should: the whole file takes the place of the old one."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)
    return path


DIGEST = sha256(b"key-of-b").hexdigest()
FILE = f"""
[keys.frontend]
key = "key-of-a"
lane = "interactive"
tokens_per_s = 50_000
burst_tokens = 200_000

[keys.nightly_2]
sha256 = "{DIGEST.upper()}"
lane = "bulk"
tokens_per_s = 0.5

[keys."ops.eu-1"]
key = "key-of-c"
"""


def test_what_the_file_says_of_a_key(tmp_path: Path) -> None:
    ring = KeyRing((), write(tmp_path / "keys.toml", FILE))
    assert ring.guards
    assert ring.caller_of(b"key-of-a") == Caller("frontend", Lane.INTERACTIVE, 50_000, 200_000)
    assert ring.caller_of(b"key-of-b") == Caller("nightly_2", Lane.BULK, 0.5, 5.0)
    assert ring.caller_of(b"key-of-c") == Caller("ops.eu-1")
    assert ring.caller_of(b"key-of-d") is None
    assert ring.caller_of(DIGEST.encode()) is None


def test_a_small_quota_still_holds_a_token(tmp_path: Path) -> None:
    ring = KeyRing((), write(tmp_path / "keys.toml", '[keys.a]\nkey = "k"\ntokens_per_s = 0.01\n'))
    caller = ring.caller_of(b"k")
    assert caller is not None
    assert caller.burst_tokens == 1.0


def test_a_file_without_keys_opens_to_nobody(tmp_path: Path) -> None:
    ring = KeyRing((), write(tmp_path / "keys.toml", "[keys]\n"))
    assert ring.guards
    assert ring.caller_of(b"") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no table `keys`"),
        ("keys = 1", "there is no table `keys`"),
        ('hush = "a"\n[keys]', "something stands beside the table `keys`"),
        ("[keys", "is not TOML (at end of document)."),
        ('[keys.a]\nkey = "hush', "is not TOML (at end of document)."),
        ("[keys.a]\nkey = hush", "is not TOML (at line 2, column 7)."),
        ("[keys.hush]\n[keys.hush]", "is not TOML (at line 2, column 11)."),
        ('[keys]\na = "hush"', "`a` is not a table"),
        ('[keys."two hush"]\nkey = "k"', "the name of entry 1 must have"),
        ('[keys.""]\nkey = "k"', "the name of entry 1 must have"),
        ('[keys.hush-ü]\nkey = "k"'.replace("hush-ü", '"hush-ü"'), "the name of entry 1 must have"),
        ('[keys.api-key-1]\nkey = "k"', "not begin with `api-key-`"),
        ("[keys.a]", "`a` needs one of `sha256` and `key`"),
        (f'[keys.a]\nkey = "hush"\nsha256 = "{DIGEST}"', "`a` needs one of `sha256` and `key`"),
        ('[keys.a]\nkey = "hush"\nhush = 1', "`a` has a field that is none of `key`, `sha256`, `lane`, "),
        ('[keys.a]\nkey = "hush"\ntokens_per_sec = 1', "`a` has the field `tokens_per_sec`, which is none of `key`, "),
        ('[keys.a]\nkey = ""', "`key` of `a` must be printable"),
        ('[keys.a]\nkey = " hush"', "`key` of `a` must be printable"),
        ('[keys.a]\nkey = "hush\\n"', "`key` of `a` must be printable"),
        ("[keys.a]\nkey = 12345678", "`key` of `a` must be printable"),
        ('[keys.a]\nsha256 = "hush"', "`sha256` of `a` must have 64 hexadecimal digits"),
        (f'[keys.a]\nsha256 = "{DIGEST}0"', "`sha256` of `a` must have 64 hexadecimal digits"),
        ('[keys.a]\nkey = "hush"\nlane = "fast"', "`lane` of `a` must be one of `interactive`, `bulk`"),
        ('[keys.a]\nkey = "hush"\nlane = 1', "`lane` of `a` must be one of `interactive`, `bulk`"),
        ('[keys.a]\nkey = "hush"\ntokens_per_s = 0', "`tokens_per_s` of `a` must be a number from 0.001 to 1e+12"),
        ('[keys.a]\nkey = "hush"\ntokens_per_s = true', "`tokens_per_s` of `a` must be a number"),
        ('[keys.a]\nkey = "hush"\ntokens_per_s = nan', "`tokens_per_s` of `a` must be a number"),
        ('[keys.a]\nkey = "hush"\ntokens_per_s = "9"', "`tokens_per_s` of `a` must be a number"),
        (
            '[keys.a]\nkey = "hush"\ntokens_per_s = 1\nburst_tokens = 0.5',
            "`burst_tokens` of `a` must be a number from 1",
        ),
        ('[keys.a]\nkey = "hush"\nburst_tokens = 5', "`a` has `burst_tokens` and no `tokens_per_s`"),
        ('[keys.a]\nkey = "hush"\n[keys.b]\nkey = "hush"', "`a` and `b` have the same key"),
        ('[keys.a]\nkey = "own-key"', "`a` is also a key of --api-key"),
    ],
)
def test_a_wrong_file_is_told_without_what_stands_in_it(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path / "keys.toml", text)
    with pytest.raises(Misconfigured) as caught:
        KeyRing(["own-key"], path)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"nothing\.toml cannot be read: No such file or directory\."):
        keys_file.read(tmp_path / "nothing.toml")
    with pytest.raises(Misconfigured, match=r"cannot be read: Is a directory\."):
        keys_file.read(tmp_path)
    (tmp_path / "latin.toml").write_bytes("[keys]\n# ü".encode("latin-1"))
    with pytest.raises(Misconfigured, match=r"latin\.toml is not UTF-8 \(at byte 9\)\."):
        keys_file.read(tmp_path / "latin.toml")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream.api.keys._POLL_S", 0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def reloads(outcome: str) -> float:
    return float(metrics.KEYS_RELOADS.labels(outcome)._value.get())


@pytest.mark.usefixtures("quick")
async def test_a_changed_file_counts_and_a_removed_key_is_refused_from_then_on(
    tmp_path: Path, producer: StubProducer, connect_to: Connect
) -> None:
    path = write(tmp_path / "keys.toml", FILE)
    app = create_app(Settings(api_key=("own-key",), api_keys_file=path), producer)
    async with app.router.lifespan_context(app), connect_to(app) as client:

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers=bearer(key))).status_code

        assert [await status(f"key-of-{each}") for each in "abcd"] == [200, 200, 200, 401]
        before = reloads("ok")
        write(path, '[keys.d]\nkey = "key-of-d"\n')
        await until(lambda: reloads("ok") == before + 1)
        assert [await status(f"key-of-{each}") for each in "abcd"] == [401, 401, 401, 200]
        assert await status("own-key") == 200


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("broken", ["[keys.hush", "", None])
async def test_a_broken_file_changes_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None
) -> None:
    path = write(tmp_path / "keys.toml", FILE)
    ring, looks = KeyRing((), path), 0
    look, before, good = ring._look, reloads("failed"), reloads("ok")

    def counted(path: Path) -> None:
        nonlocal looks
        look(path)
        looks += 1

    monkeypatch.setattr(ring, "_look", counted)
    with structlog.testing.capture_logs() as logs:
        async with ring.watched():
            if broken is None:
                path.unlink()
            else:
                path.write_text(broken)
            await until(lambda: reloads("failed") > before)
            seen = looks
            await until(lambda: looks > seen + 2)
            assert ring.caller_of(b"key-of-a") is not None
            write(path, '[keys.d]\nkey = "key-of-d"\n')
            await until(lambda: reloads("ok") > good)
    assert ring.caller_of(b"key-of-a") is None
    assert ring.caller_of(b"key-of-d") is not None
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("keys.file_broken", "error"),
        ("keys.reloaded", "info"),
    ]
    assert "hush" not in str(logs)


@pytest.mark.usefixtures("quick")
async def test_a_file_of_the_same_size_and_time_is_seen_when_it_takes_the_others_place(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", '[keys.a]\nkey = "key-of-a"\n')
    ring, before = KeyRing((), path), path.stat()
    async with ring.watched():
        new = tmp_path / "new"
        new.write_text('[keys.a]\nkey = "key-of-b"\n')
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        new.rename(path)
        await until(lambda: ring.caller_of(b"key-of-b") is not None)


@pytest.mark.usefixtures("quick")
async def test_a_defect_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "keys.toml", FILE)
    ring, before, read = KeyRing((), path), reloads("failed"), keys_file.read

    def broken(path: Path) -> dict[bytes, Caller]:
        raise ZeroDivisionError

    monkeypatch.setattr(keys_file, "read", broken)
    with structlog.testing.capture_logs() as logs:
        async with ring.watched():
            write(path, "[keys]\n")
            await until(lambda: reloads("failed") > before)
            monkeypatch.setattr(keys_file, "read", read)
            write(path, '[keys.d]\nkey = "key-of-d"\n')
            await until(lambda: ring.caller_of(b"key-of-d") is not None)
    assert [line["event"] for line in logs] == ["keys.failed", "keys.reloaded"]


@pytest.mark.parametrize("text", ['[keys.a]\nkey = "hush', None])
def test_a_process_with_a_wrong_file_ends_with_one_line(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-m", "embedstream.api", "--port", "0", "--redis-url", f"unix://{tmp_path}/nothing.sock"]
    ended = subprocess.run([*command, "--api-keys-file", str(path)], capture_output=True, text=True, timeout=60)
    reason = "cannot be read: No such file or directory" if text is None else "is not TOML (at end of document)"
    assert (ended.returncode, ended.stderr) == (78, f"embedstream: {path} {reason}.\n")
