from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedstream.producer.request import Options, Prepared, cut_into_jobs
from embedstream.shared import jobs
from embedstream.shared.cards import ModelCard
from embedstream.shared.lanes import Lane
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.tokenization import Tokens

CARD = ModelCard("m", Recipe(100_000, (Pooling.MEAN,), normalize=True, dimension=4, vocab_size=60_000), "{}", "r")


def prepared(lengths: list[int], card: ModelCard = CARD, options: Options | None = None) -> Prepared:
    columns = np.array(lengths, np.uint32)
    ids = (np.arange(columns.sum()) % 50_000).astype(np.uint32)
    return Prepared(card, [[1]], Tokens(ids, columns), options or Options())


@given(st.lists(st.one_of(st.integers(1, 40), st.integers(1, 20_000)), min_size=1, max_size=300))
def test_jobs_fit_the_format_and_hold_every_input_in_order(lengths: list[int]) -> None:
    request = prepared(lengths)
    cut = cut_into_jobs(request, bytes(16), 1000)
    decoded = [jobs.decode(*job.encode()) for job in cut]  # encoding checks the limits
    assert [job.index for job in decoded] == list(range(len(cut)))
    assert {job.count for job in decoded} == {len(cut)}
    np.testing.assert_array_equal(np.concatenate([job.lengths for job in decoded]), request.tokens.lengths)
    ids: list[Any] = [job.ids for job in decoded]
    np.testing.assert_array_equal(np.concatenate(ids), request.tokens.ids)
    np.testing.assert_array_equal(
        [job.first_input for job in decoded], np.cumsum([0] + [job.n_inputs for job in decoded])[:-1]
    )


def test_short_inputs_fill_jobs_of_64() -> None:
    assert [job.n_inputs for job in cut_into_jobs(prepared([10] * 130), bytes(16), 1)] == [64, 64, 2]


def test_a_long_input_is_a_job_alone() -> None:
    assert [job.n_inputs for job in cut_into_jobs(prepared([5, 20_000, 5]), bytes(16), 1)] == [1, 1, 1]


def test_ids_are_as_wide_as_the_vocabulary_needs() -> None:
    wide = replace(CARD, recipe=replace(CARD.recipe, vocab_size=250_000), fingerprint=b"")
    for card, size in ((CARD, 2), (wide, 4)):
        (job,) = cut_into_jobs(prepared([3], card), bytes(16), 1)
        assert job.ids is not None
        assert job.ids.dtype.itemsize == size


def test_options_and_card_are_in_every_job() -> None:
    options = Options(lane=Lane.BULK)
    for job in cut_into_jobs(prepared([1] * 100, options=options), b"i" * 16, 77):
        assert (job.lane, job.ttl_ms, job.request_id) == (Lane.BULK, 77, b"i" * 16)
        assert job.fingerprint == CARD.fingerprint
        assert job.options is options.vectors
