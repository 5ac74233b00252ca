"""The texts of `make bench-engine`: unique, tokenised once, the longest first, and the batches they are cut into.

All sides read the same arrays, so that none tokenises or sorts while a clock runs.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.tokenization import TextTokenizer, offsets

DATA = Path(__file__).parent / "data"
LENGTH_CLASSES = (16, 64, 128, 256)
"""Tokens of the sequences of the sets that have one length each."""
_CLASS_TOKENS = 32_768
"""Of each such set: more than any side computes in its time."""

Ids = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Set:
    """Tokenised texts, the longest first.

    Args:
        ids: (total,) token ids, special tokens included.
        lengths: (n,) tokens of each text, adding up to `total`.
        texts: (n,) what they were made of; empty where they were cut out of other texts' ids.
    """

    ids: Ids
    lengths: NDArray[np.int64]
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, first: int, end: int) -> tuple[Ids, NDArray[np.int64]]:
        """Ids and lengths of neighbouring texts."""
        starts = offsets(self.lengths)
        return self.ids[starts[first] : starts[end]], self.lengths[first:end]

    def only(self, places: Sequence[int]) -> Set:
        """The texts of some places, in their order."""
        ids = np.concatenate([self.batch(place, place + 1)[0] for place in places])
        return Set(ids, self.lengths[list(places)], tuple(self.texts[place] for place in places if self.texts))

    def batches(self, budget: int) -> list[tuple[int, int]]:
        """First and end of each batch: as many texts as fit, each counted as long as the longest of its batch.

        Args:
            budget: most tokens of a batch, padding included; a single text may exceed it. 0: all in one batch.
        """
        cut = []
        first = 0
        while first < len(self):
            n_rows = max(1, budget // int(self.lengths[first])) if budget else len(self)
            cut.append((first, min(first + n_rows, len(self))))
            first += n_rows
        return cut

    def save(self, path: Path) -> None:
        """For another process."""
        np.savez(path, ids=self.ids, lengths=self.lengths, texts=np.array(json.dumps(self.texts)))

    @classmethod
    def load(cls, path: Path) -> Set:
        """What `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["ids"], arrays["lengths"], tuple(json.loads(str(arrays["texts"]))))


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spread: of sorted batches they hold every length in proportion."""
    taken = min(count, max(1, most))
    return [int((place + 0.5) * count / taken) for place in range(taken)]


def read_texts(path: Path, most: int | None = None) -> list[str]:
    """The first texts of JSON lines, those that come again left out.

    Args:
        path: lines with a field `text`; ending in .gz where they are compressed.
        most: texts that are taken; None for all.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return list(islice(unique(json.loads(line)["text"] for line in lines), most))


def unique(texts: Iterable[str]) -> Iterator[str]:
    """Each text once, as soon as it comes."""
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def tokenised(tokenizer: TextTokenizer, texts: Sequence[str], most_tokens: int) -> Set:
    """A set of texts, cut where they are too long."""
    tokens = tokenizer.encode(list(texts), truncate_to=most_tokens)
    lengths = tokens.lengths.astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    rows = np.split(tokens.ids, tokens.offsets[1:-1])
    ids = np.concatenate([rows[place] for place in order])
    return Set(ids, lengths[order], tuple(texts[place] for place in order.tolist()))


def of_one_length(source: Set, length: int) -> Set | None:
    """Sequences of exactly so many tokens: the beginnings of longer ones, with their last token; None without any."""
    rows = np.split(source.ids, offsets(source.lengths)[1:-1])
    cut = [np.append(row[: length - 1], row[-1]) for row in rows if len(row) >= length]
    cut = cut[: max(1, _CLASS_TOKENS // length)]
    return Set(np.concatenate(cut), np.full(len(cut), length)) if cut else None
