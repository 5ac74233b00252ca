"""`embedstream embed`: texts in, one JSON line with a vector out for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import BinaryIO, TextIO

import orjson

from embedstream.shared import exits, load_failures, logs, runfile
from embedstream.shared.errors import InputTooLong, Unavailable
from embedstream.shared.settings import LogLevel, Role, Settings

_SLICE = 1024
"""Texts sent at once: enough to fill batches, few enough that a long pipe shows its first lines soon."""


_LONG = "With this command --truncate cuts it, and --long-inputs chunk embeds it piece by piece."


def run(
    settings: Settings,
    texts: Sequence[str],
    *,
    dimensions: int | None,
    normalize: bool | None,
    truncate: bool,
    prompt_name: str | None = None,
    input_type: str | None = None,
    task: str | None = None,
    stdin: TextIO | None = None,
    stdout: BinaryIO | None = None,
) -> int:
    """Embed texts, or the lines of stdin where there are none or only `-`, and print them in order.

    Raises:
        EmbedstreamError: as the producer library does.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout.buffer
    texts = [] if texts == ["-"] else texts
    if not texts and stdin.isatty():
        exits.complain("nothing to embed: give texts as arguments, or one per line on stdin")
        return exits.USAGE
    connected = runfile.connected(settings)
    # To stderr, and no more than what went wrong: stdout carries JSON alone.
    logs.configure(connected.model_copy(update={"log_level": LogLevel.WARNING}), Role.EMBED)
    from embedstream.producer import SyncProducer

    source = iter(texts) if texts else (line.rstrip("\r\n") for line in stdin)
    index = 0
    with SyncProducer(connected.redis_url, model=connected.chosen_model, settings=connected) as producer:
        for some in _slices(source):
            try:
                vectors = producer.embed(
                    some,
                    dimensions=dimensions,
                    normalize=normalize,
                    truncate_prompt_tokens=-1 if truncate else None,
                    prompt_name=prompt_name,
                    input_type=input_type,
                    task=task,
                )
            except InputTooLong as error:
                raise InputTooLong(f"{error} {_LONG}", param=error.param) from None
            except Unavailable as error:
                raise Unavailable(f"{error}{_why(connected)}", retry_after_s=error.retry_after_s) from error
            for text, vector in zip(some, vectors, strict=True):
                line = {"index": index, "text": text, "embedding": vector}
                stdout.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
                index += 1
            stdout.flush()
    return exits.OK


def _why(settings: Settings) -> str:
    """Why no consumer serves the model, where one has left its reason: who has a shell here may read it."""
    url, model = settings.redis_url, settings.served_names[0]
    reason = load_failures.newest_at(url, settings.key_prefix, model) if url else None
    return f" The last consumer of `{model}` could not load it: {reason}" if reason else ""


def _slices(source: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(source, _SLICE)):
        yield some
