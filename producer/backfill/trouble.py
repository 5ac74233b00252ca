"""What goes wrong with files, in errors that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from embedstream.shared.errors import Misconfigured, Unavailable
from embedstream.shared.urls import without_secrets

from .input_formats import DAMAGE


class RemoteTroubleError(OSError):
    """A storage behind a URL did not answer as it should; another try may go well."""


@contextmanager
def explained(path: str, row: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what goes wrong with a file into errors that name it.

    Args:
        path: as people are told.
        row: tells how far reading has come.

    Raises:
        Misconfigured: the file is gone, damaged, or may not be read.
        Unavailable: a storage behind a URL has trouble.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Misconfigured(f"There is no {path}{_at(row)}.") from error
    except PermissionError as error:
        raise Misconfigured(f"{path} may not be read{_at(row)}.") from error
    except RemoteTroubleError as error:
        raise Unavailable(f"{path} could not be read{_at(row)}: {error}") from error
    except (OSError, EOFError, pa.ArrowException, *DAMAGE) as error:
        raise Misconfigured(f"{path} is damaged, or not what its name says{_at(row)}: {in_short(error)}") from error


def in_short(error: BaseException) -> str:
    """The first line of an error, without what may let somebody in."""
    lines = without_secrets(str(error)).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _at(row: Callable[[], int] | None) -> str:
    return "" if row is None else f", at row {row()}"
