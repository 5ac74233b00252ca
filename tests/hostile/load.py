"""Clients with large requests, each asking again as soon as it is answered; and probes beside them.

`python -m tests.hostile.load --port 8000 --kind floats` asks until it is ended. It is a process of its own: what reads
megabytes of answers must not delay the probes that are timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping

from .peer import Peer, post

_PATIENCE_S = 120.0
_SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards vex us again today "


def bodies() -> Mapping[str, bytes]:
    """Large requests by the name of their kind."""
    texts = [f"{number} {_SENTENCE}" for number in range(2048)]
    ids = [[number % 20_000 + 1000 for number in range(row, row + 512)] for row in range(585)]
    kinds: dict[str, dict[str, object]] = {
        "floats": {"input": texts},
        "base64": {"input": texts, "encoding_format": "base64"},
        "ids": {"input": ids, "encoding_format": "bytes_only"},
        "long": {"input": _SENTENCE * 12_000, "truncate_prompt_tokens": -1},
    }
    return {kind: json.dumps(fields).encode() for kind, fields in kinds.items()}


async def ask_for_ever(port: int, body: bytes) -> None:
    """One client: a request, its answer, and again; a refusal is followed by a pause."""
    request = post(body)
    peer = await Peer.dial(port)
    while True:
        await peer.say(request)
        reply = await peer.hear(_PATIENCE_S)
        if reply.status != 200:
            await asyncio.sleep(0.25)


async def probe(port: int, count: int, pause_s: float = 0.01) -> list[float]:
    """Ask /health so many times, half of them on new connections.

    Returns:
        Seconds each answer took, connecting included; sorted.

    Raises:
        AssertionError: an answer was not 200.
    """
    taken_s = []
    kept = await Peer.dial(port)
    for number in range(count):
        start_s = time.perf_counter()
        peer = await Peer.dial(port) if number % 2 else kept
        reply = await peer.ask(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        taken_s.append(time.perf_counter() - start_s)
        assert reply.status == 200, reply.body
        if peer is not kept:
            peer.hang_up()
        await asyncio.sleep(pause_s)
    kept.hang_up()
    return sorted(taken_s)


async def _run(port: int, kind: str, clients: int) -> None:
    chosen = list(bodies().values()) if kind == "all" else [bodies()[kind]]
    await asyncio.gather(*(ask_for_ever(port, chosen[number % len(chosen)]) for number in range(clients)))


def main() -> None:
    """Ask until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kind", choices=[*bodies(), "all"], default="all")
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    asyncio.run(_run(options.port, options.kind, options.clients))


if __name__ == "__main__":
    main()
