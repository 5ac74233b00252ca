"""A consumer without torch: the real loop around a toy that sleeps for as long as a device would compute.

Each batch is written to a journal before it is computed, so what reached the device is known whatever happens next.
Settings come from the environment, as for a real consumer; faults and ablations come from the command line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.outcome import Embedded, RowVectors
from embedstream.consumer.pace import Pace
from embedstream.consumer.service import Served, serve
from embedstream.shared import logs
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

from . import toy
from .ablations import apply


@dataclass(frozen=True)
class Behaviour:
    """What the toy device does.

    Args:
        base_s: of every pass.
        tokens_per_s: of a pass beyond that, padding included.
        most_tokens: a larger batch finds too little memory; 0 for no limit.
    """

    base_s: float
    tokens_per_s: float
    most_tokens: int


class ToyDevice:
    """Embeds, or fails as the ids say."""

    def __init__(self, behaviour: Behaviour, journal: Path, name: str) -> None:
        self._behaviour = behaviour
        self._name = name
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def free(self) -> None:
        """Its memory is made up, and never in pieces."""

    def embed(self, batch: MicroBatch) -> Embedded:
        """Vectors for every row of the batch."""
        self._note(batch)
        most = self._behaviour.most_tokens
        if most and batch.n_tokens > most:
            raise MemoryError(f"{batch.n_tokens} tokens, and room for {most}")
        started_s = time.monotonic()
        time.sleep(self._behaviour.base_s + batch.cost / self._behaviour.tokens_per_s)
        if (batch.ids == toy.KILL).any():
            os._exit(9)
        if (batch.ids == toy.FAIL).any():
            raise ValueError("an input of the kind that fails")
        if (batch.ids == toy.HANG).any():
            time.sleep(3600)
        rows = np.arange(batch.n_rows)
        vectors = toy.vectors(batch.ids, batch.lengths)
        group = RowVectors(rows, vectors, None, np.ones(batch.n_rows, np.bool_))
        return Embedded([group], time.monotonic() - started_s)

    def _note(self, batch: MicroBatch) -> None:
        starts = np.cumsum(batch.lengths) - batch.lengths
        rows = []
        for owner, row, start in zip(batch.owner.tolist(), batch.row.tolist(), starts.tolist(), strict=True):
            entry = batch.entries[owner]
            job = entry.job
            tag = toy.tag_of(batch.ids[start : start + 2].tolist())
            rows.append([job.request_id.hex(), job.index, row, entry.raw.deaths, entry.raw.lane.value, tag])
        line = {"at_s": time.time(), "consumer": self._name, "tokens": batch.n_tokens, "rows": rows}
        os.write(self._journal, json.dumps(line, separators=(",", ":")).encode() + b"\n")


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--base-ms", type=float, required=True)
    parser.add_argument("--tokens-per-s", type=float, required=True)
    parser.add_argument("--most-tokens", type=int, default=0)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--ablate", default="")
    options = parser.parse_args()
    settings = Settings(served_model_name=(toy.MODEL,))
    logs.configure(settings, "consumer")
    if options.ablate:
        apply(options.ablate)
    card = toy.card()
    behaviour = Behaviour(options.base_ms / 1000, options.tokens_per_s, options.most_tokens)
    device = ToyDevice(behaviour, options.journal, options.name)
    served = Served(
        card,
        TextTokenizer(card.tokenizer, card.recipe),
        device,
        "float32",
        "toy",
        Budget(options.budget),
        Pace(options.budget),
    )
    asyncio.run(serve(settings, settings.redis_url or "", served, options.name))


if __name__ == "__main__":
    main()
