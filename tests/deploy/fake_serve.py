"""`embedstream serve` with fake roles, as a program of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from embedstream.deploy import local
from embedstream.shared import flags
from embedstream.shared.settings import Role, Settings


def command(role: Role, fd: int | None) -> list[str]:
    line = [sys.executable, "-S", str(Path(__file__).with_name("fake_role.py")), role.value]
    return line if fd is None else [*line, "--fd", str(fd)]


def serve(settings: Settings) -> int:
    return local.run(settings, command=command)


if __name__ == "__main__":
    flags.run_alone(Role.SERVE, serve)
