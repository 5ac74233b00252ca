from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_process import Process, SideFailed, Work, serve
from engine_sides import Choice
from engine_texts import Set

from .sums import Sums


@pytest.fixture
def side() -> Sums:
    return Sums()


@pytest.fixture
def work(side: Sums, tmp_path: Path) -> Work:
    Set(np.arange(12, dtype=np.uint32), np.array([5, 3, 3, 1]), ("a", "b", "c", "d")).save(tmp_path / "some.npz")
    return Work(side, tmp_path)


def saved(folder: Path, name: str) -> dict[int, list[float]]:
    with np.load(folder / name) as arrays:
        return dict(zip(arrays["places"].tolist(), arrays["vectors"].tolist(), strict=True))


def test_a_run_computes_the_batches_that_are_named(work: Work, side: Sums, tmp_path: Path) -> None:
    found = work.run("some", 10, "other", [1], save="out.npz")
    assert (found["tokens"], found["texts"]) == (4, 2)
    assert found["seconds"] > 0
    assert side.ran == [([2], "other")]
    assert saved(tmp_path, "out.npz") == {2: [8 + 9 + 10, 3], 3: [11, 1]}


def test_batches_are_prepared_once_for_rounds_of_the_same(work: Work, side: Sums) -> None:
    for _ in range(3):
        work.run("some", 10, "", [0, 1])
    assert side.prepared == [2, 2]
    work.run("some", 10, "", [1])
    assert side.prepared == [2, 2, 2]


def test_vectors_of_single_texts_come_with_their_places(work: Work, tmp_path: Path) -> None:
    work.vectors("some", 6, "", [0, 2, 3], save="exact.npz")
    assert saved(tmp_path, "exact.npz") == {0: [10, 5], 2: [27, 3], 3: [11, 1]}


def test_single_texts_are_timed_alone_and_equally_often(work: Work, side: Sums) -> None:
    taken = work.latency("some", "", seconds=0)
    assert len(taken) == 4
    assert side.ran == 8 * [([1], "")]  # each once before the clock


def test_a_trial_of_a_set_of_one_batch_computes_it_whole(work: Work) -> None:
    found = work.calibrate("some", 0, "", seconds=1)
    assert found["tokens"] == 12
    assert found["batch_s"] > 0


def test_texts_are_embedded_in_the_order_that_is_asked_for(work: Work, side: Sums) -> None:
    found = work.embed("some", 7, "", [2, 0])
    assert side.embedded == [(["c", "a"], 7, 4.0)]
    assert (found["tokens"], found["texts"]) == (8, 2)


def test_what_fails_is_answered_and_the_side_goes_on(work: Work) -> None:
    asked = [
        {"do": "run", "of": "some", "budget": 10, "way": "", "batches": [9]},
        {"do": "exit"},
        {"do": "embed", "of": "some", "budget": 7, "way": "", "places": [0]},
    ]
    answers: list[Any] = []
    serve(work, io.StringIO("".join(json.dumps(line) + "\n" for line in asked)), answers.append)
    assert answers[0]["failed"].startswith("IndexError")
    assert "exit is not one of" in answers[1]["failed"]
    assert answers[2]["result"]["texts"] == 1


GIVEN = {"device": "cpu", "threads": 1, "prepare_all": False}


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Process]:
    process = Process(Choice("ours", "float32", "padded"), tmp_path, {"model": "all-MiniLM-L6-v2", **GIVEN})
    yield process
    process.close()


def test_the_engine_answers_from_a_process_of_its_own(ours: Process, work: Work, tmp_path: Path) -> None:
    assert ours.description["encoder"] == "padded"
    assert ours.description["dtype"] == "float32"
    found = ours.ask("run", of="some", budget=10, way="", batches=[0, 1], save="out.npz")
    assert (found["tokens"], found["texts"]) == (12, 4)
    assert len(saved(tmp_path, "out.npz")) == 4
    assert ours.ask("embed", of="some", budget=10, way="", places=[1, 0])["texts"] == 2
    assert len(ours.ask("latency", of="some", way="", seconds=0)) == 4
    with pytest.raises(SideFailed, match="ours float32 padded: IndexError"):
        ours.ask("run", of="some", budget=10, way="", batches=[9])


def test_a_side_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(SideFailed, match=r"ours float32: ModelLoadError: .*missing"):
        Process(Choice("ours", "float32"), tmp_path, {"model": str(tmp_path / "missing"), **GIVEN})
