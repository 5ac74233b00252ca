"""Logging: structured events. Input texts and API keys never enter a log line.

Modules log through `get_logger()`, whose lines end in the standard logger `embedstream`: an application that uses the
producer library hears of warnings on stderr and decides about the rest itself. Our own commands call `configure`.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import structlog

from .settings import LogFormat, Settings

NAME = "embedstream"


def get_logger() -> Any:
    """The logger of all our modules; it follows structlog's configuration, and writes nothing to stdout."""
    return structlog.wrap_logger(logging.getLogger(NAME))


def configure(settings: Settings, role: str, warnings: list[structlog.typing.EventDict] | None = None) -> None:
    """Set the process's log level and format, log to stderr, and name the role in every line.

    Args:
        settings: the level and the format.
        role: of the process.
        warnings: where given, takes each warning in place of stderr, for a command that tells them itself.
    """
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format is LogFormat.JSON
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            *([] if warnings is None else [_Keep(warnings)]),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    logger = logging.getLogger(NAME)
    logger.handlers = [_Stderr()]
    logger.setLevel(level)
    logger.propagate = False
    logging.getLogger().handlers = [_Libraries(logging.WARNING)]
    structlog.contextvars.bind_contextvars(role=role)


class _Keep:
    """A processor that takes warnings out of the log."""

    def __init__(self, warnings: list[structlog.typing.EventDict]) -> None:
        self._warnings = warnings

    def __call__(self, _: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if method != "warning":
            return event
        self._warnings.append(event)
        raise structlog.DropEvent


class _Libraries(logging.Handler):
    """Brings the warnings of libraries into the same stream and form as our own events."""

    def emit(self, record: logging.LogRecord) -> None:
        write = get_logger().error if record.levelno >= logging.ERROR else get_logger().warning
        write("library.log", logger=record.name, message=record.getMessage(), exc_info=record.exc_info)


class _Stderr(logging.Handler):
    """Writes the finished line to what is `sys.stderr` at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{record.getMessage()}\n")
        except (OSError, ValueError):  # closed at the end of the process
            self.handleError(record)


def frames_of(error: BaseException, most: int = 6) -> tuple[str, ...]:
    """Where an error was raised, innermost last: for log lines on code whose messages may quote a text."""
    frames = traceback.extract_tb(error.__traceback__)[-most:]
    return tuple(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


def told(error: BaseException | None) -> str:
    """An error of Redis or the network for a log line: its class and what it says, which its `repr` leaves out.

    Not for what a tokenizer or a model raises: that may quote a text.
    """
    return f"{type(error).__name__}: {error}"
