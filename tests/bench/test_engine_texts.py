from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from engine_sides import padded
from engine_texts import Set, of_one_length, read_texts, spread, unique


@pytest.fixture
def some() -> Set:
    """Four texts of 5, 3, 3 and 1 tokens."""
    return Set(np.arange(12, dtype=np.uint32), np.array([5, 3, 3, 1]), ("a", "b", "c", "d"))


def test_a_batch_is_as_large_as_its_longest_text_allows(some: Set) -> None:
    assert some.batches(10) == [(0, 2), (2, 4)]  # 2 x 5 tokens; then 2 x 3, the last of which is filled up
    assert some.batches(9) == [(0, 1), (1, 4)]
    assert some.batches(2) == [(0, 1), (1, 2), (2, 3), (3, 4)]  # each exceeds it alone, but for the last
    assert some.batches(0) == [(0, 4)]


def test_batches_and_choices_keep_ids_with_their_text(some: Set) -> None:
    ids, lengths = some.batch(1, 3)
    assert ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert lengths.tolist() == [3, 3]
    chosen = some.only([3, 0])
    assert chosen.ids.tolist() == [11, 0, 1, 2, 3, 4]
    assert chosen.lengths.tolist() == [1, 5]
    assert chosen.texts == ("d", "a")


def test_a_set_goes_to_another_process_as_it_is(some: Set, tmp_path: Path) -> None:
    some.save(tmp_path / "some.npz")
    again = Set.load(tmp_path / "some.npz")
    assert again.texts == some.texts
    np.testing.assert_array_equal(again.ids, some.ids)
    np.testing.assert_array_equal(again.lengths, some.lengths)


def test_chosen_batches_are_spread_over_all_lengths() -> None:
    assert spread(10, 2) == [2, 7]
    assert spread(10, 10) == spread(10, 99) == [*range(10)]
    assert spread(10, 0) == [5]
    places = spread(4999, 137)
    assert len({*places}) == 137
    assert np.mean(places) == pytest.approx(2499, abs=1)


def test_texts_that_come_again_are_left_out(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in "abacad")
    (tmp_path / "corpus.jsonl").write_text(lines)
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        assert read_texts(tmp_path / name) == ["a", "b", "c", "d"]
        assert read_texts(tmp_path / name, 2) == ["a", "b"]
    assert [*unique("zyzx")] == ["z", "y", "x"]


def test_texts_of_one_length_keep_their_first_and_last_token(some: Set) -> None:
    cut = of_one_length(some, 3)
    assert cut is not None
    assert cut.lengths.tolist() == [3, 3, 3]
    assert cut.ids.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert of_one_length(some, 6) is None


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = padded(np.array([4, 5, 6, 7], np.uint32), np.array([3, 1]), pad_id=9)
    assert ids.tolist() == [[4, 5, 6], [7, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
