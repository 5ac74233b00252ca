"""How requests end, as metrics tell it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from embedstream.shared import metrics
from embedstream.shared.errors import InvalidInput, Overloaded, ResultTimeout, Unavailable
from embedstream.shared.lanes import Lane

_OUTCOMES: tuple[tuple[type[Exception], str], ...] = (
    (Overloaded, "refused"),
    (Unavailable, "unavailable"),
    (ResultTimeout, "timeout"),
    (InvalidInput, "invalid"),
    (Exception, "failed"),
)


@contextmanager
def counted(lane: Lane, *, until_result: bool = True) -> Iterator[None]:
    """Count how the work in this context ends.

    Args:
        lane: of the request.
        until_result: whether the work goes on to the whole result; if not, only its failures are counted.
    """
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        outcome = next(outcome for kind, outcome in _OUTCOMES if isinstance(error, kind))
        metrics.REQUESTS.labels(lane, outcome).inc()
        raise
    except BaseException:  # cancelled, or a generator that is not read to its end: nobody waits any more
        metrics.REQUESTS.labels(lane, "abandoned").inc()
        raise
    if until_result:
        metrics.REQUESTS.labels(lane, "ok").inc()
        metrics.REQUEST_SECONDS.labels(lane).observe(time.perf_counter() - start)
