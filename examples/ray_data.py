"""Embed a dataset with Ray Data on the fleet that serves everybody else: Ray reads and writes, the fleet computes.

    python examples/ray_data.py IN OUT redis://queue:6379 [--text-column text] [--actors 4]

IN and OUT are folders or URLs of Parquet. It needs Ray (`pip install '.[ray]'`) where it runs and on the nodes of the
cluster. docs/ray.md says when this is the right tool.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, SaveMode

from embedstream.producer import SyncProducer


class Embed:
    """An actor's work: it holds one connection to the queue, and adds the column `embedding` to each batch.

    Args:
        url: of the queue's Redis.
        column: where the texts are.
    """

    def __init__(self, url: str, column: str) -> None:
        self._column = column
        self._producer = SyncProducer(url)
        self._producer.open()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Vectors for all rows; it waits while the queue is full, and for a fleet that is away for a while."""
        texts = batch[self._column].to_pylist()
        pairs = self._producer.map(texts, lane="bulk", long_inputs="truncate", patience_s=3600)
        vectors = np.stack([vector for _, vector in pairs])
        lists = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
        return batch.append_column("embedding", lists)

    def __del__(self) -> None:
        self._producer.close()


def embedded(rows: Dataset, url: str, column: str = "text", actors: int = 2) -> Dataset:
    """The rows with their vectors, computed when they are asked for.

    Args:
        rows: any dataset of Ray with a column of texts.
        url: of the queue's Redis, as the nodes reach it.
        column: where the texts are.
        actors: how many processes keep the fleet busy; each needs little of a CPU, most of it for tokenising.
    """
    return rows.map_batches(
        Embed,
        fn_constructor_args=(url, column),
        batch_format="pyarrow",
        batch_size=4096,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=0,  # they wait most of the time; with a CPU for each, none might be left to read the files
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("url", metavar="REDIS_URL")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--actors", type=int, default=2)
    args = parser.parse_args()
    rows = ray.data.read_parquet(args.input)
    rows = embedded(rows, args.url, args.text_column, args.actors)
    rows.write_parquet(args.output, mode=SaveMode.ERROR)  # a run that failed begins anew, in an empty folder


if __name__ == "__main__":
    main()
