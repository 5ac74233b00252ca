"""`embedstream doctor`: what a consumer would make of a model, before it serves."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from embedstream.consumer import cpu, requirements
from embedstream.shared import exits, logs
from embedstream.shared.settings import LogLevel, Role, Settings

from .against import Against


def run(settings: Settings, *, against: Against | None, as_json: bool) -> int:
    """Load a model, look at it, and print what was found.

    Returns:
        The exit code: 0 when all is well, 1 when a check failed, 78 when packages are missing.

    Raises:
        ModelLoadError: it cannot be served.
        Misconfigured: what to compare with is not installed.
    """
    if code := requirements.complain_if_missing():
        return code
    warnings: list[Any] = []  # of the loader: they are checks here, for a report is no place for log lines
    logs.configure(settings.model_copy(update={"log_level": LogLevel.WARNING}), Role.DOCTOR, warnings)
    cpu.prepare(settings)  # as in a consumer: it is timed
    from embedstream.consumer import reference
    from embedstream.consumer.examination import examine, told_by_loader

    from . import doctor_view

    if against is not None:
        reference.require()
    with Console(stderr=True).status("starting …") as status:  # shows nothing where stderr is no terminal

        def tell(step: str) -> None:
            status.update(f"{step} …")

        found, examined = examine(settings, tell)
        found.checks += told_by_loader(warnings)
        if against is not None:
            found.against = reference.compare(settings, examined, tell)
    if as_json:
        sys.stdout.buffer.write(doctor_view.as_json(found))
    else:
        doctor_view.show(found)
    return exits.OK if found.passed else exits.FOUND_FAULTS
