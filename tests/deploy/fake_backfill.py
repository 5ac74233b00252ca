"""`embedstream backfill` with fake consumers, as a program of its own."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from embedstream.deploy import backfill, backfill_run
from embedstream.shared import flags
from embedstream.shared.settings import Role


def command(_role: Role, _fd: int | None) -> list[str]:
    return [sys.executable, "-P", str(Path(__file__).with_name("fake_consumer.py"))]


if __name__ == "__main__":
    backfill_run.run = partial(backfill_run.run, command=command)
    flags.run_alone(Role.BACKFILL, backfill.backfill)
