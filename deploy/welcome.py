"""What `serve` prints when it is ready: where it listens, and a request to try."""

from __future__ import annotations

import json
import shlex

from embedstream.shared.settings import Settings, variable_of
from embedstream.shared.urls import without_password


def ready_block(settings: Settings, url: str, redis_url: str, *, elapsed_s: float) -> str:
    """A few lines that end with a command to copy.

    Args:
        settings: those of `serve`, with the number of consumers that it has started.
        url: the server as seen from this machine.
        redis_url: the queue, for consumers and producers that join it.
        elapsed_s: time from the start until it answered.
    """
    model = settings.served_names[0]
    queue = without_password(redis_url)
    counts = f"{_count(settings.api_workers, 'API process')}, {_count(settings.consumers or 0, 'consumer')}"
    state = f"is ready after {elapsed_s:.1f} s: {model} on {url}"
    if settings.consumers == 0:
        state = f"is up on {url} and waits for consumers: embedstream consumer --redis-url {shlex.quote(queue)}"
    lines = [
        f"embedstream {state}",
        f"  {counts}; Ctrl-C stops it",
        f"  queue: {queue}" + ("" if settings.redis_url else " (embedded Valkey)"),
        *_kept(settings),
        curl_line(url, model, with_key=bool(settings.api_key or settings.api_keys_file)),
    ]
    return "\n".join(lines)


def _kept(settings: Settings) -> list[str]:
    if settings.redis_url:
        return []
    if settings.data_dir is None:
        return ["  The queue lives in memory and ends with this process; --data-dir FOLDER keeps it."]
    return [f"  The queue is kept in {settings.data_dir}."]


def curl_line(url: str, model: str, *, with_key: bool) -> str:
    """A request that works when pasted into a shell; a key is named by its variable, never shown."""
    body = json.dumps({"model": model, "input": "Hello, world"}, separators=(",", ":"), ensure_ascii=False)
    # In double quotes, so that the shell puts the key in.
    key = f' -H "Authorization: Bearer ${variable_of("api_key")}"' if with_key else ""
    return f"curl {shlex.quote(f'{url}/v1/embeddings')} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _count(number: int, what: str) -> str:
    if number == 1:
        return f"1 {what}"
    return f"{number} {what}{'es' if what.endswith('s') else 's'}"
