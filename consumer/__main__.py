"""`python -m embedstream.consumer`: one consumer process."""

from __future__ import annotations

from embedstream.shared import flags, runfile
from embedstream.shared.settings import Role, Settings

from . import cpu, requirements


def consume(settings: Settings) -> int:
    """Read jobs, embed them and publish the results, until SIGTERM."""
    if code := requirements.complain_if_missing():
        return code
    connected = runfile.connected(settings)
    cpu.prepare(settings)
    from .main import run  # brings torch

    return run(connected)


def main() -> None:
    """Run the command."""
    flags.run_alone(Role.CONSUMER, consume)


if __name__ == "__main__":
    main()
