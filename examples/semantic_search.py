"""Search, clusters, near-duplicates and a map of the passages whose vectors `embedstream backfill` wrote.

    embedstream backfill bench/data/passages.sample.jsonl.gz build/passages.parquet \
        --id-column id --carry src --carry text --truncate
    python examples/semantic_search.py build/passages.parquet bench/data/queries.sample.jsonl.gz build/map.png

It needs a running server for the queries, scikit-learn and matplotlib. docs/worked-example.md walks through it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.manifold import TSNE

from embedstream.producer import SyncProducer

Matrix = NDArray[np.float32]
BLOCK = 2048
"""Rows that are compared with each other at once: 16 MiB of cosines."""
COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b"),
    *("#e377c2", "#00b8c4", "#a6a600", "#1a2a6c", "#f2b701", "#7a0026"),
)


def main() -> None:
    args = arguments()
    table = pq.read_table(args.vectors)
    vectors = matrix(table["embedding"])
    model = table.schema.metadata[b"embedstream.model"].decode()
    print(f"{len(vectors)} vectors of {vectors.shape[1]} by {model}")
    with SyncProducer(args.redis_url, model=model) as producer:  # queries must meet vectors of their own model
        hits = show_hits(args.query, table, vectors, producer)
        show_quality(args.queries, table["id"].to_pylist(), vectors, producer)
    clusters = MiniBatchKMeans(args.clusters, n_init=3, random_state=0).fit_predict(vectors)
    clusters = np.unique(clusters, return_inverse=True)[1]  # one may have ended empty
    names = cluster_names(table["text"].to_pylist(), clusters)
    show_clusters(clusters, names, table["src"].to_pylist())
    show_duplicates(list(near_duplicates(vectors, args.near)), args.near, table)
    draw(places(vectors), clusters, names, hits, args.query, args.picture)
    print(f"\nmap: {args.picture}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="Parquet with id, src, text and embedding")
    parser.add_argument("queries", type=Path, help="JSON lines with text, and pos: the id of the passage to be found")
    parser.add_argument("picture", type=Path, help="the map, a PNG")
    parser.add_argument("--query", default="what happens to my data when the power fails")
    parser.add_argument("--clusters", type=int, default=12)
    parser.add_argument(
        "--near", type=float, default=0.95, help="cosine from which on two passages are near-duplicates"
    )
    parser.add_argument("--redis-url", help="of the queue; without it the server that runs on this machine")
    return parser.parse_args()


def matrix(column: pa.ChunkedArray) -> Matrix:
    """(rows, dim) of unit length, from a column of lists of one size; the lists lie one behind the other."""
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    vectors = flat.reshape(len(column), -1).astype(np.float32)
    unit: Matrix = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def search(vectors: Matrix, queries: Matrix, count: int) -> NDArray[np.intp]:
    """(queries, count): the rows with the largest cosines, best first."""
    order: NDArray[np.intp] = np.argsort(-(queries @ vectors.T), axis=1)
    return order[:, :count]


def show_hits(query: str, table: pa.Table, vectors: Matrix, producer: SyncProducer) -> NDArray[np.intp]:
    """Print what is found for one query, and give its rows."""
    wanted: Matrix = producer.embed_query(query)
    hits: NDArray[np.intp] = search(vectors, wanted, 5)[0]
    print(f"\n{query}")
    for row in hits.tolist():
        print(f"  {vectors[row] @ wanted[0]:.3f}  {table['src'][row]}: {short(table['text'][row].as_py())}")
    return hits


def show_quality(path: Path, ids: Sequence[str], vectors: Matrix, producer: SyncProducer) -> None:
    """Print how often, and how far up, the queries find the passage that they stand above in the documents."""
    row_of = {name: row for row, name in enumerate(ids)}
    queries = [query for query in json_lines(path) if query.get("pos") in row_of]
    found = search(vectors, producer.embed_query([query["text"] for query in queries], lane="bulk"), 10)
    hit = found == np.array([row_of[query["pos"]] for query in queries])[:, None]
    rank = 1 + hit.argmax(axis=1)
    mrr, recall = np.where(hit.any(axis=1), 1 / rank, 0).mean(), hit.any(axis=1).mean()
    print(f"\n{len(queries)} queries: MRR@10 {mrr:.3f}, recall@10 {recall:.3f}")


def cluster_names(texts: Sequence[str], clusters: NDArray[np.intp]) -> list[str]:
    """The words that a cluster's texts use more than the others do."""
    counter = TfidfVectorizer(
        stop_words="english",
        token_pattern=r"[A-Za-z]{3,}",  # noqa: S106 - a token of a text
        min_df=3,
        max_df=0.5,
    )
    weights = counter.fit_transform(texts)
    words, usual = counter.get_feature_names_out(), np.asarray(weights.mean(axis=0)).ravel()
    names = []
    for cluster in range(clusters.max() + 1):
        more = np.asarray(weights[clusters == cluster].mean(axis=0)).ravel() - usual
        names.append(", ".join(distinct([words[place] for place in np.argsort(-more)[:12]])[:3]))
    return names


def distinct(words: Sequence[str]) -> list[str]:
    """Without those that another one begins with, or the other way round: table, tables."""
    kept: list[str] = []
    for word in words:
        if not any(word.startswith(other) or other.startswith(word) for other in kept):
            kept.append(word)
    return kept


def show_clusters(clusters: NDArray[np.intp], names: Sequence[str], sources: Sequence[str]) -> None:
    """Print each cluster's size, words, and where most of it comes from."""
    print("\nclusters")
    for cluster, name in enumerate(names):
        sizes = np.unique(np.array(sources)[clusters == cluster], return_counts=True)
        most = int(np.argmax(sizes[1]))
        size = int(sizes[1].sum())
        print(f"  {cluster + 1:2}  {size:4}  {name}  ({sizes[1][most] / size:.0%} {sizes[0][most]})")


def near_duplicates(vectors: Matrix, least: float) -> Iterator[tuple[float, int, int]]:
    """Pairs of rows with their cosine, where that is at least `least`; a block against a block, never all at once."""
    for first in range(0, len(vectors), BLOCK):
        for second in range(first, len(vectors), BLOCK):
            cosines = vectors[first : first + BLOCK] @ vectors[second : second + BLOCK].T
            for row, other in np.argwhere(cosines >= least).tolist():
                if first + row < second + other:
                    yield float(cosines[row, other]), first + row, second + other


def show_duplicates(pairs: list[tuple[float, int, int]], least: float, table: pa.Table) -> None:
    """Print the closest pairs."""
    print(f"\n{len(pairs)} pairs with a cosine of {least} or more")
    for cosine, row, other in sorted(pairs, reverse=True)[:10]:
        print(f"  {cosine:.3f}  {table['id'][row]} {table['id'][other]}  {short(table['text'][row].as_py())}")


def places(vectors: Matrix) -> Matrix:
    """(rows, 2): neighbours stay neighbours. PCA takes the noise out first, and most of the time."""
    few = PCA(min(50, *vectors.shape), random_state=0).fit_transform(vectors)
    flat: Matrix = TSNE(perplexity=min(30, len(vectors) // 4), random_state=0).fit_transform(few)
    return flat


def draw(
    at: Matrix, clusters: NDArray[np.intp], names: Sequence[str], hits: NDArray[np.intp], query: str, path: Path
) -> None:
    """The map: a dot for each passage, coloured by cluster, with a ring around what the query found."""
    mpl.use("Agg")  # no screen is needed
    figure, axes = plt.subplots(figsize=(11, 7.5), layout="constrained")
    for cluster, name in enumerate(names):
        own = at[clusters == cluster]
        axes.scatter(
            own[:, 0], own[:, 1], s=6, color=COLORS[cluster % len(COLORS)], linewidths=0, label=f"{name} ({len(own)})"
        )
        put_word(axes, own, name.split(",")[0])
    ringed = "\n".join(textwrap.wrap(f"found for “{query}”", 38))
    found = at[hits]
    axes.scatter(found[:, 0], found[:, 1], s=70, facecolors="none", edgecolors="black", label=ringed, zorder=4)
    axes.set_title(f"{len(at):,} passages of documentation, by the vectors of their texts", loc="left")
    axes.set(xticks=[], yticks=[])
    figure.legend(loc="outside right upper", frameon=False, title="cluster: its words (passages)", markerscale=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def put_word(axes: Axes, dots: Matrix, word: str) -> None:
    """Where the cluster is densest: at the dot that has a fifth of it closest around itself."""
    apart = np.linalg.norm(dots[:, None] - dots, axis=2)
    near = len(dots) // 5
    x, y = dots[np.partition(apart, near, axis=1)[:, near].argmin()].tolist()
    halo = withStroke(linewidth=3, foreground="white")
    axes.text(x, y, word, fontsize=12, fontweight="bold", ha="center", va="center", path_effects=[halo])


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file, plain or packed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def short(text: str) -> str:
    return textwrap.shorten(text, 76, placeholder=" …")


if __name__ == "__main__":
    main()
