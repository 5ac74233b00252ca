"""Answers in the order of the inputs, whatever order the jobs are done in."""

from __future__ import annotations

from typing import Any

import pytest

from embedstream.producer import InputFailure, Options, Producer
from embedstream.shared.errors import InputTooLong, InvalidInput, JobFailed
from embedstream.shared.results import Status
from embedstream.shared.settings import Settings


async def test_slices_follow_one_another(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[index % 900 + 1] for index in range(300)], Options())
        whole = await producer.run(prepared)
        seen = 0
        async for piece in producer.in_order(prepared):
            assert piece.first == seen
            assert (piece.vectors == whole.vectors[seen : seen + len(piece.tokens)]).all()
            seen += len(piece.tokens)
        assert seen == 300


@pytest.mark.parametrize("error", [InvalidInput("a", param="input"), InputTooLong("b", param="x"), JobFailed("c")])
def test_a_failure_is_an_error(error: Exception) -> None:
    if isinstance(error, InvalidInput):
        failure = InputFailure.of(error)
        assert failure.error().param == error.param  # type: ignore[attr-defined] # an InvalidInput again
    else:
        failure = InputFailure(Status.FAILED, str(error))
    assert type(failure.error()) is type(error)
    assert str(failure.error()) == str(error)
