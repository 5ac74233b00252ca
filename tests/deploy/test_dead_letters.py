from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
import redis as redis_sync
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from embedstream.deploy import cli, dead_letter_store
from embedstream.deploy import dead_letter_commands as commands
from embedstream.deploy import dead_letter_view as view
from embedstream.deploy.dead_letter_store import DeadLetterStore, Filter
from embedstream.shared import jobs
from embedstream.shared.cards import Announcement, ModelEntry
from embedstream.shared.connections import connect_sync
from embedstream.shared.jobs import Job
from embedstream.shared.keys import FIELD_JOBS, FIELD_WAS_CANCELLED, Keys, models
from embedstream.shared.lanes import Lane
from embedstream.shared.settings import Settings

CARD = bytes(range(16))
KILLED = "4 consumers died with it"


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_sync.Redis]:
    client = connect_sync(redis_url)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _announced(redis: redis_sync.Redis, prefix: str) -> None:
    entry = ModelEntry("m", CARD.hex(), 1).encode()
    redis.hset(models(prefix), mapping={"m": entry, "alias": entry})


def ids_job(number: int, **changes: Any) -> Job:
    made = Job(
        request_id=number.to_bytes(16, "big"),
        index=1,
        count=3,
        first_input=64,
        ttl_ms=5000,
        lengths=np.array([2, 3], np.uint32),
        ids=np.array([2, 3, 2, 9, 3], np.uint16),
        fingerprint=CARD,
    )
    return replace(made, **changes)


def text_job(number: int, text: str = "a secret") -> Job:
    return Job(
        number.to_bytes(16, "big"), 0, 1, 0, 5000, jobs.text_lengths((text,)), texts=(text,), lane=Lane.BULK
    )  # fmt: skip


def keep(redis: redis_sync.Redis, keys: Keys, job: Job, *, at: str = "*", why: str = KILLED, **more: Any) -> str:
    header, body = job.encode()
    fields = {"h": header, "b": body, "rt": "", "why": why, "src": "7-0", "lane": job.lane.value, "n": 4, **more}
    return redis.xadd(keys.dead_letters, fields, id=at).decode()  # type: ignore[union-attr, arg-type] # bytes of RESP2


@pytest.fixture
def run(redis_url: str, prefix: str) -> Any:
    """The command, as a pipe sees it."""

    def invoke(*arguments: str, **options: Any) -> Result:
        where = ["--redis-url", redis_url, "--key-prefix", prefix]
        return CliRunner().invoke(cli.app, ["dead-letters", *arguments, *where], **options)

    return invoke


def kept(redis: redis_sync.Redis, keys: Keys) -> list[str]:
    found: Any = redis.xrange(keys.dead_letters)
    return [entry_id.decode() for entry_id, _ in found]


def on_lane(redis: redis_sync.Redis, keys: Keys, lane: Lane) -> list[tuple[str, dict[bytes, bytes]]]:
    found: Any = redis.xrange(keys.lane(lane))
    return [(entry_id.decode(), fields) for entry_id, fields in found]


def test_list_is_newest_first_with_tabs(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    keep(redis, keys, ids_job(1), at="1700000000000-0", row=65)
    keep(redis, keys, text_job(2), at="1700000001000-5", why="bad\tnews\x1b[31m\nof it", n="")
    result = run("list")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["1700000001000-5", "2023-11-14T22:13:21Z", "bulk", f"{2:032x}", "1/1", "1", "0", "", *[
            r"bad\tnews\x1b[31m\nof it"
        ]],
        ["1700000000000-0", "2023-11-14T22:13:20Z", "interactive", f"{1:032x}", "2/3", "2", "5", "4", KILLED],
    ]  # fmt: skip


def test_list_says_how_many_more_there_are(
    redis: redis_sync.Redis, keys: Keys, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter_store, "PAGE_ENTRIES", 2)
    for number in range(1, 8):
        keep(redis, keys, ids_job(number), at=f"{number}-0", why="even" if number % 2 == 0 else "odd")
    result = run("list", "--limit", "3", "--json")
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["7-0", "6-0", "5-0"]
    assert "4 more" in result.stderr
    filtered = run("list", "--limit", "2", "--reason", "ODD", "--json")
    assert [json.loads(line)["id"] for line in filtered.stdout.splitlines()] == ["7-0", "5-0"]
    assert "2 more" in filtered.stderr
    whole = run("list", "--json")
    assert len(whole.stdout.splitlines()) == 7
    assert whole.stderr == ""


def test_list_in_json(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    keep(redis, keys, ids_job(1), at="1700000000000-0")
    assert json.loads(run("list", "--json").stdout) == {
        "id": "1700000000000-0",
        "when": "2023-11-14T22:13:20Z",
        "lane": "interactive",
        "request_id": f"{1:032x}",
        "job": 1,
        "n_jobs": 3,
        "inputs": 2,
        "tokens": 5,
        "deaths": 4,
        "reason": KILLED,
    }


def test_no_body_is_read_to_list(redis: redis_sync.Redis, keys: Keys) -> None:
    header, body = ids_job(1).encode()
    redis.xadd(keys.dead_letters, {"h": header, "b": body, "why": "x" * 5000, "lane": "bulk"})
    (letter,) = DeadLetterStore(redis, keys).scan(Filter())
    assert letter.body_bytes == len(body)
    assert len(letter.reason) == dead_letter_store.LONGEST_VALUE_BYTES


def test_filters(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    old = keep(redis, keys, ids_job(1), at="1700000000000-0")
    new = keep(redis, keys, text_job(2), why="malformed: what")

    def found(*filters: str) -> list[str]:
        return [json.loads(line)["id"] for line in run("list", "--json", *filters).stdout.splitlines()]

    assert found() == [new, old]
    assert found("--lane", "bulk") == [new]
    assert found("--reason", "CONSUMERS") == [old]
    assert found("--older-than-s", "3600") == [old]
    assert found("--older-than-s", "0") == [new, old]
    assert found("--lane", "bulk", "--reason", KILLED) == []
    assert "No dead letters of `m` that meet the filters" in run("list", "--reason", "nothing").stderr


def test_an_empty_list(run: Any) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No dead letters of `m`.\n")


def test_the_table_fits_a_narrow_terminal(redis: redis_sync.Redis, keys: Keys) -> None:
    keep(redis, keys, ids_job(0xAB << 120), at="1700000000000-0")
    redis.xadd(keys.dead_letters, {"h": b"junk", "why": "\x1b]0;title\x07"}, id="1700000000001-0")
    letters = list(DeadLetterStore(redis, keys).scan(Filter()))
    for width, shown in ((80, "ab000000…"), (160, f"{0xAB << 120:032x}")):
        output = StringIO()
        view.print_table(letters, Console(file=output, width=width, force_terminal=True))
        plain = re.sub(r"\x1b\[\d*m", "", output.getvalue())
        assert "\x1b" not in plain
        assert r"\x1b]0;title\x07" in "".join(plain.split())
        assert all(word in plain for word in ("1700000000000-0", "2023-11-14 22:13:20", "interactive", "2/3", shown))
        assert max(map(len, plain.splitlines())) <= width


def test_show_tells_all_but_the_texts(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    letter = keep(redis, keys, text_job(2, "a secret\x1b[2J"), row=0)
    plain = run("show", letter)
    assert plain.exit_code == 0
    for line in (
        rf"request_id +{2:032x}",
        "form +text",
        "job +1/1",
        "lengths +12",
        "ttl_ms +5000",
        "suspected_input +0",
    ):
        assert re.search(f"^{line}$", plain.stdout, re.MULTILINE), line
    assert "secret" not in plain.output
    assert "secret" not in run("show", letter, "--json").output
    assert r"a secret\x1b[2J" in run("show", letter, "--texts").stdout
    assert json.loads(run("show", letter, "--texts", "--json").stdout)["texts"] == ["a secret\x1b[2J"]


def test_show_counts_token_ids(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    letter = keep(redis, keys, ids_job(1))
    result = run("show", letter, "--json", "--texts")
    said = json.loads(result.stdout)
    assert (said["form"], said["tokens"], said["lengths"]) == ("token ids", 5, [2, 3])
    assert said["fingerprint"] == CARD.hex()
    assert "texts" not in said
    assert "no texts" in result.stderr


def test_prompt_and_adapter_are_shown_and_kept(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    job = replace(text_job(2), lane=Lane.INTERACTIVE, prompt_name="role:query", adapter="retrieval.query")
    letter = keep(redis, keys, job)
    plain = run("show", letter).stdout
    for line in ("prompt_name +role:query", "adapter +retrieval.query"):
        assert re.search(f"^{line}$", plain, re.MULTILINE), line
    assert run("replay", letter).exit_code == 0
    ((_, fields),) = on_lane(redis, keys, Lane.INTERACTIVE)
    again = jobs.decode(fields[b"h"], fields[b"b"])
    assert (again.prompt_name, again.adapter) == ("role:query", "retrieval.query")


def test_show_a_damaged_one(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    header, body = ids_job(1).encode()
    letter = keep(redis, keys, ids_job(1), b=body[:-1])
    said = json.loads(run("show", letter, "--json").stdout)
    assert "5 tokens announced" in said["malformed"]
    assert (said["request_id"], said["header_bytes"]) == (f"{1:032x}", len(header))


@pytest.mark.parametrize("command", ["show", "replay", "drop"])
def test_an_unknown_id_is_one_line(run: Any, command: str) -> None:
    result = run(command, "5-0")
    assert result.exit_code == 70
    assert "embedstream: there is no dead letter 5-0 of `m`\n" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["show", "replay", "drop"])
@pytest.mark.parametrize("letter", ["5", "5-*", "all", "+"])
def test_what_is_no_id_is_said_so(run: Any, command: str, letter: str) -> None:
    result = run(command, letter)
    assert result.exit_code == 2
    assert f"{letter!r} is no id" in result.stderr


@pytest.mark.parametrize("command", ["replay", "drop"])
def test_ids_or_all_but_not_both(redis: redis_sync.Redis, keys: Keys, run: Any, command: str) -> None:
    letter = keep(redis, keys, ids_job(1))
    for arguments in ([], [letter, "--all"], ["--reason", "x"], [letter, "--lane", "bulk"]):
        assert run(command, *arguments).exit_code == 2
    assert kept(redis, keys) == [letter]


def test_replay_puts_the_job_back_and_counts_it(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    letter = keep(redis, keys, ids_job(1, result_ttl_s=5), rt="ek:{m}:r:x")
    other = keep(redis, keys, text_job(2))
    result = run("replay", letter, "--ttl-s", "60", "--result-ttl-s", "90")
    assert result.exit_code == 0, result.output
    assert f"{1:032x}" in result.stdout
    assert kept(redis, keys) == [other]
    ((entry_id, fields),) = on_lane(redis, keys, Lane.INTERACTIVE)
    assert entry_id in result.stdout
    assert list(fields) == [b"h", b"b", b"rt"]
    assert fields[b"rt"] == b"ek:{m}:r:x"
    header, body = ids_job(1, ttl_ms=60_000, result_ttl_s=90).encode()
    assert (fields[b"h"], fields[b"b"]) == (header, body)
    assert redis.hgetall(keys.totals) == {
        b"i:jobs": b"1",
        b"i:tokens": b"5",
        b"i:bytes": str(len(header) + len(body)).encode(),
    }


def test_the_lane_is_where_it_came_from(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    """The header may name another one: the stream decides."""
    here, unknown = keep(redis, keys, ids_job(1), lane="bulk"), keep(redis, keys, ids_job(2), lane="")
    assert run("replay", here, unknown).exit_code == 0
    assert len(on_lane(redis, keys, Lane.BULK)) == len(on_lane(redis, keys, Lane.INTERACTIVE)) == 1
    assert redis.hmget(keys.totals, "i:jobs", "b:jobs") == [b"1", b"1"]


def test_replay_all_that_a_filter_takes(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    for number in (1, 2):
        keep(redis, keys, text_job(number))
    other = keep(redis, keys, ids_job(3))
    result = run("replay", "--all", "--lane", "bulk")
    assert result.exit_code == 0, result.output
    assert "2 of 2 replayed" in result.stderr
    assert kept(redis, keys) == [other]
    sent = [jobs.decode(fields[b"h"], fields[b"b"]) for _, fields in on_lane(redis, keys, Lane.BULK)]
    assert [int.from_bytes(job.request_id, "big") for job in sent] == [1, 2]
    assert {(job.ttl_ms, job.result_ttl_s) for job in sent} == {(3_600_000, 3600)}
    assert redis.hmget(keys.totals, "b:jobs", "b:tokens") == [b"2", b"4"]  # 8 bytes of text each


def test_the_old_failure_is_not_picked_up(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    letter = keep(redis, keys, ids_job(1))
    result_key = keys.result(ids_job(1).request_id)
    before: dict[Any, Any] = {
        "1:0": b"failed",
        "1:1": b"failed",
        "0:0": b"fine",
        "10:0": b"fine",
        FIELD_WAS_CANCELLED: b"1",
    }
    redis.hset(result_key, mapping=before)
    assert run("replay", letter).exit_code == 0
    assert redis.hgetall(result_key) == {b"0:0": b"fine", b"10:0": b"fine", FIELD_JOBS: b"3"}
    assert 3500 < redis.ttl(result_key) <= 3600


def test_a_malformed_one_is_refused(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    junk = redis.xadd(keys.dead_letters, {"h": b"junk\x1b", "b": b""})
    good = keep(redis, keys, ids_job(1))
    result = run("replay", "--all")
    assert result.exit_code == 70
    assert "is no job and cannot be replayed: the header has 5 bytes" in result.stderr
    assert "1 of 2 replayed" in result.stderr
    assert good in result.stdout
    assert kept(redis, keys) == [junk.decode()]  # type: ignore[union-attr] # bytes of RESP2


def test_token_ids_of_another_revision_need_force(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    letter = keep(redis, keys, ids_job(1, fingerprint=b"other revision.."))
    result = run("replay", letter)
    assert result.exit_code == 70
    assert "--force" in result.stderr
    assert kept(redis, keys) == [letter]
    assert run("replay", letter, "--force").exit_code == 0
    assert kept(redis, keys) == []


def test_what_live_consumers_serve_counts(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    beat = Announcement("c", "m", ("m",), "ab" * 16, 4, 16, "mean", "float32", "cpu", "r", 1)
    redis.zadd(keys.live, {"c": 2**52, "gone": 1})
    redis.set(keys.heartbeat("c"), beat.encode())
    old, new = keep(redis, keys, ids_job(1)), keep(redis, keys, ids_job(2, fingerprint=bytes.fromhex("ab" * 16)))
    result = run("replay", old, new)
    assert result.exit_code == 70
    assert kept(redis, keys) == [old]


def test_texts_made_for_another_revision_are_replayed_with_a_warning(
    redis: redis_sync.Redis, keys: Keys, run: Any
) -> None:
    letter = keep(redis, keys, replace(text_job(1), fingerprint=b"other revision.."))
    result = run("replay", letter)
    assert result.exit_code == 0
    assert "not served" in result.stderr
    assert kept(redis, keys) == []


def test_of_two_who_replay_at_once_one_does(redis: redis_sync.Redis, keys: Keys) -> None:
    store, letter = DeadLetterStore(redis, keys), keep(redis, keys, ids_job(1))
    found = store.get(letter)
    assert found is not None
    outcomes = [store.replay(found[0], ids_job(1), ttl_s=1, result_ttl_s=1) for _ in range(2)]
    assert [outcome is not None for outcome in outcomes] == [True, False]
    assert len(on_lane(redis, keys, Lane.INTERACTIVE)) == 1


def test_drop_some(redis: redis_sync.Redis, keys: Keys, run: Any) -> None:
    letters = [keep(redis, keys, ids_job(number)) for number in (1, 2, 3)]
    result = run("drop", letters[0], "9-9", letters[2])
    assert result.exit_code == 70
    assert "2 dropped" in result.stderr
    assert "there is no dead letter 9-9" in result.stderr
    assert kept(redis, keys) == [letters[1]]


def test_drop_all_wants_a_yes(redis: redis_sync.Redis, keys: Keys, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letter_store, "PAGE_ENTRIES", 2)
    monkeypatch.setattr(dead_letter_store, "DROP_ENTRIES", 2)
    letters = [keep(redis, keys, text_job(number)) for number in range(5)]
    other = keep(redis, keys, ids_job(9))
    refused = run("drop", "--all", "--lane", "bulk")
    assert refused.exit_code == 2
    assert "5 dead letters of `m`; confirm it with --yes" in refused.stderr
    assert kept(redis, keys) == [*letters, other]
    done = run("drop", "--all", "--lane", "bulk", "--yes")
    assert (done.exit_code, done.stderr) == (0, "5 dropped.\n")
    assert kept(redis, keys) == [other]


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_drop_all_asks(
    redis: redis_sync.Redis, keys: Keys, redis_url: str, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []

    def confirm(question: str, *, err: bool) -> bool:
        asked.append(question)
        return answer

    keep(redis, keys, ids_job(1))
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(typer, "confirm", confirm)
    settings = Settings(redis_url=redis_url, key_prefix=keys.prefix)
    assert commands.drop(settings, commands.Selection((), True, Filter()), yes=False) == 0
    assert asked == ["Drop 1 dead letters of `m` for good?"]
    assert len(kept(redis, keys)) == (0 if answer else 1)


def test_the_model_may_be_named(redis: redis_sync.Redis, keys: Keys, run: Any, prefix: str) -> None:
    letter = keep(redis, keys, ids_job(1))
    assert letter in run("list", "--model", "alias").stdout
    redis.hset(models(prefix), "n", ModelEntry("n", CARD.hex(), 1).encode())
    several = run("list")
    assert several.exit_code == 69
    assert "`alias`, `m`, `n`" in several.stderr
    assert letter in run("list", "--model", "m").stdout
    assert run("list", "--model", "n").stderr == "No dead letters of `n`.\n"
    unknown = run("list", "--model", "unknown")
    assert unknown.exit_code == 69
    assert "`unknown`" in unknown.stderr
    redis.delete(models(prefix))
    assert letter in run("list", "--model", "m").stdout
    assert "No consumer has announced a model" in run("list").stderr


def test_without_redis_one_line_says_so() -> None:
    url = "redis://user:secret@127.0.0.1:1"
    result = CliRunner().invoke(cli.app, ["dead-letters", "list", "--redis-url", url])
    assert result.exit_code == 69
    assert len(result.stderr.splitlines()) == 1
    assert "secret" not in result.stderr
