"""Trying again what a database may do in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from embedstream.shared.errors import Unavailable
from embedstream.shared.logs import get_logger

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between the tries: a database that restarts is back by then, and who waits still knows what for."""

log = get_logger()

T = TypeVar("T")


def patiently(
    action: Callable[[], T], passing: tuple[type[Exception], ...], where: str, told: Callable[[Exception], str]
) -> T:
    """Do something that may be done twice, until it goes well.

    Args:
        action: what to do.
        passing: errors that may be gone in a moment.
        where: the database, for messages.
        told: what an error says, in a line.

    Raises:
        Unavailable: it did not go well within about 15 seconds.
    """
    for pause_s in PAUSES_S:
        try:
            return action()
        except passing as error:
            log.warning("backfill.sink_unavailable", output=where, reason=told(error), retry_after_s=pause_s)
            time.sleep(pause_s)
    try:
        return action()
    except passing as error:
        raise Unavailable(f"{where} does not answer: {told(error)}") from error
