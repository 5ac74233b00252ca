"""`python -m embedstream.api`: one API process."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from embedstream.shared import flags, runfile
from embedstream.shared.settings import Role, Settings


def serve_http(settings: Settings, fd: Annotated[int | None, Option("--fd", hidden=True)] = None) -> int:
    """Answer HTTP requests, until SIGTERM."""
    connected = runfile.connected(settings)
    from .main import run  # brings the HTTP stack

    return run(connected, fd)


def main() -> None:
    """Run the command."""
    flags.run_alone(Role.API, serve_http)


if __name__ == "__main__":
    main()
