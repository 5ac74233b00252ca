"""Inputs that fail alone: what became of them, and which error that is for a caller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from embedstream.shared.errors import (
    EmbedstreamError,
    InputTooLong,
    InvalidInput,
    JobFailed,
    NotServed,
    ResultTimeout,
    StaleCard,
)
from embedstream.shared.results import ResultPart, Status

ERRORS: dict[Status, type[EmbedstreamError]] = {
    Status.INVALID_INPUT: InvalidInput,
    Status.INPUT_TOO_LONG: InputTooLong,
    Status.STALE_CARD: StaleCard,
    Status.EXPIRED: ResultTimeout,
    Status.FAILED: JobFailed,
    Status.NOT_SERVED: NotServed,
}
ALONE = frozenset({Status.INVALID_INPUT, Status.INPUT_TOO_LONG, Status.FAILED})
"""What one input can fail of while its neighbours succeed; any other status is about the whole request."""


@dataclass(frozen=True, slots=True)
class InputFailure:
    """Why one input of a request has no vector.

    Args:
        status: what became of it.
        message: for people.
        param: the field of the request to mend, if any.
        refusal: the error itself, of an input that was refused before the queue.
    """

    status: Status
    message: str
    param: str | None = None
    refusal: InvalidInput | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, error: InvalidInput) -> InputFailure:
        """The failure that an error about one input stands for."""
        status = Status.INPUT_TOO_LONG if isinstance(error, InputTooLong) else Status.INVALID_INPUT
        return cls(status, str(error), error.param, error)

    def error(self) -> EmbedstreamError:
        """The error it would be if it ended the whole request."""
        if self.refusal is not None:
            return self.refusal
        kind = ERRORS[self.status]
        if issubclass(kind, InvalidInput):
            return kind(self.message, param=self.param)
        return kind(self.message)


def raise_for_rows(part: ResultPart, *, partial: bool = False) -> None:
    """Raise what the first failed row of a part says.

    Args:
        part: of a request's result.
        partial: let pass what can happen to an input alone.

    Raises:
        EmbedstreamError: of the class that its status stands for.
    """
    for row in part.rows["status"].nonzero()[0].tolist():
        failure = failure_of(part, row)
        if not (partial and failure.status in ALONE):
            raise failure.error()


def failure_of(part: ResultPart, row: int) -> InputFailure:
    """What a part says of a row of it that failed."""
    return InputFailure(Status(int(part.rows["status"][row])), part.message(row) or "The consumer gave no reason.")


class Refusals:
    """Inputs refused before the queue: the first ends the request, unless the others are to go on without it.

    Args:
        partial: whether they are.
    """

    def __init__(self, partial: bool) -> None:
        self._partial = partial
        self.failures: dict[int, InputFailure] = {}

    def refuse(self, index: int, reason: InvalidInput) -> None:
        """Refuse one input; the reason it was refused for first stays.

        Raises:
            InvalidInput: the reason, unless `partial`.
        """
        if not self._partial:
            raise reason
        self.failures.setdefault(index, InputFailure.of(reason))

    def take(self, reasons: Iterable[tuple[int, InvalidInput]]) -> None:
        """Refuse several, each by its place.

        Raises:
            InvalidInput: the first reason, unless `partial`.
        """
        for index, reason in reasons:
            self.refuse(index, reason)
