"""All consumers of the contract in one process: the real loop around tiny models, with faults for some words."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.embedder import Embedder
from embedstream.consumer.model import Model
from embedstream.consumer.outcome import Embedded, RowVectors
from embedstream.consumer.pace import Pace
from embedstream.consumer.service import Served, new_name, serve
from embedstream.shared import logs
from embedstream.shared.settings import Dtype, PoolingName, Settings

from . import models

_BUDGET = 4096
_SLOW_S = 0.5


class Faulty:
    """A model that does badly on purpose where the text says so."""

    def __init__(self, model: Model) -> None:
        self._embedder = Embedder(model)
        fail, self._not_finite, slow = (
            self._id_of(model, word) for word in (models.FAIL, models.NOT_FINITE, models.SLOW)
        )
        self._fail, self._slow = fail, slow

    @staticmethod
    def _id_of(model: Model, word: str) -> int:
        return int(model.tokenizer.encode([word], add_special_tokens=False).ids[0])

    def free(self) -> None:
        """Nothing to free."""

    def embed(self, batch: MicroBatch) -> Embedded:
        """Vectors for every row of the batch."""
        if (batch.ids == self._fail).any():
            raise ValueError("an input of the kind that fails")
        if (batch.ids == self._slow).any():
            time.sleep(_SLOW_S)
        done = self._embedder.embed(batch)
        ends = np.cumsum(batch.lengths)
        bad = np.array(
            [
                (batch.ids[end - size : end] == self._not_finite).any()
                for end, size in zip(ends, batch.lengths, strict=True)
            ]
        )
        return replace(done, groups=[self._spoil(group, bad) for group in done.groups]) if bad.any() else done

    @staticmethod
    def _spoil(group: RowVectors, bad: np.ndarray) -> RowVectors:
        return replace(group, finite=group.finite & ~bad[group.rows])


async def _serve_all(url: str, folder: Path, tokenizer_json: str) -> None:
    async with asyncio.TaskGroup() as group:
        for name, model in models.MODELS.items():
            settings = Settings(
                redis_url=url,
                key_prefix=name,
                model=str(models.write(model, tokenizer_json, folder / name)),
                served_model_name=tuple(model.names),
                matryoshka_dims=model.sizes,
                pooling=PoolingName.ALL if model.all_tokens else None,
                dtype=Dtype.FLOAT32,
                device="cpu",
                threads=1,
            )
            loaded, pace = Model.load(settings), Pace(_BUDGET)
            pace.observe(_BUDGET, _BUDGET, 0.05)  # else the first batch may take as long as it likes
            device = Faulty(loaded) if model.faults else Embedder(loaded)
            served = Served(loaded.card, loaded.tokenizer, device, loaded.dtype, "cpu", Budget(_BUDGET), pace)
            group.create_task(serve(settings, url, served, new_name()))


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs.configure(Settings(), "consumer")
    asyncio.run(_serve_all(options.redis_url, options.folder, (options.folder / "tokenizer.json").read_text()))


if __name__ == "__main__":
    main()
