"""The engine without a queue: the rows of a file, tokenised and embedded in this process, as fast as it goes.

It prints `ready` when the model is warm; for each line on stdin it embeds all rows once and prints the seconds. The
rows come in the order in which a backfill sends them: what is compared is what the queue and the files cost.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from embedstream.consumer.capacity import find_capacity
from embedstream.consumer.direct import Direct
from embedstream.consumer.model import Model
from embedstream.shared.settings import Settings


def main() -> None:
    """Arguments: a Parquet file with a column `text`, a file for the vectors, rows embedded together."""
    source, vectors_to, window = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    settings = Settings()
    model = Model.load(settings)
    direct = Direct(model, find_capacity(model, settings).budget)
    texts = pq.read_table(source, columns=["text"]).column("text").to_pylist()
    direct.embed(texts[:256])
    print("ready", flush=True)
    for _ in sys.stdin:
        started_s = time.perf_counter()
        vectors = []
        for first in range(0, len(texts), window):
            vectors += direct.embed(texts[first : first + window]).vectors
        print(time.perf_counter() - started_s, flush=True)
        np.save(vectors_to, np.stack([vector for vector in vectors if vector is not None]))


if __name__ == "__main__":
    main()
