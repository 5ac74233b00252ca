"""Command-line flags made from `Settings`, so that a setting is written down once.

Each command gets the settings of its role. Only flags really given reach `Settings`, so flags win over the
environment, the environment wins over the defaults, and `model_fields_set` says what the operator chose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from . import exits
from .settings import PREFIX, Role, Settings, flag_of, roles_of, unknown_variables, variable_of
from .settings_page import as_text, choices_of, default_of, plain_type, problems_of, range_of

_METAVARS: dict[type, str] = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def new_app(help_text: str | None = None, *, alone: bool = False) -> typer.Typer:
    """A typer app in our form: plain text, and no tracebacks with local variables, which may hold keys.

    Args:
        help_text: what `--help` says first.
        alone: the app is one command without a name, which may run without arguments.
    """
    return typer.Typer(
        help=help_text,
        add_completion=False,
        no_args_is_help=not alone,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def command_of(role: Role, function: Callable[..., int]) -> Callable[..., None]:
    """A typer command that builds the settings of a role and calls `function(settings, …)`.

    Args:
        role: which settings become options.
        function: its first parameter takes the `Settings`; the others are typer parameters of its own. Its result is
            the exit code; errors of ours end as one line on stderr.
    """
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    names = [name for name in Settings.model_fields if role in roles_of(name)]

    def command(**arguments: Any) -> None:
        given = {name: value for name in names if (value := arguments.pop(name)) is not None}
        settings = read_settings(given)
        raise typer.Exit(exits.run(partial(function, settings, **arguments)))

    parameters = [*own, *map(_option, names)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect documents it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = inspect.getdoc(function)
    return command


def run_alone(role: Role, function: Callable[..., int]) -> None:
    """Run one role's command as a whole program, such as `python -m embedstream.api`."""
    app = new_app(alone=True)
    app.command()(command_of(role, function))
    app(prog_name=f"python -m embedstream.{role}")


def read_settings(given: Mapping[str, object]) -> Settings:
    """The settings from flags and environment; what is wrong is told on stderr and ends the process with 2.

    Args:
        given: values of the flags on the command line, by the setting's name.
    """
    for name in unknown_variables():
        exits.complain(f"{name} is set, but there is no such setting; ignored")
    try:
        values: dict[str, Any] = {name: _joined(value) for name, value in given.items()}
        return Settings(**values)
    except ValidationError as error:
        for problem in problems_of(error, given):
            exits.complain(problem)
        raise typer.Exit(exits.USAGE) from None


def environment_of(settings: Settings, **replaced: object) -> dict[str, str]:
    """The variables that give another process the same explicit settings.

    Args:
        settings: what was set explicitly is passed on.
        replaced: other values for some settings.
    """
    values = {name: getattr(settings, name) for name in settings.model_fields_set} | replaced
    return {variable_of(name): as_text(value) for name, value in values.items() if value is not None}


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment less everything that looks like a setting."""
    return {name: value for name, value in environ.items() if not name.upper().startswith(PREFIX)}


def _joined(value: object) -> object:
    """A repeated flag in the form its variable has, so that `--api-key a,b` means the same in both."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _option(name: str) -> inspect.Parameter:
    kind = plain_type(name)
    annotation: Any = str
    metavar = _METAVARS.get(kind)
    flag = flag_of(name)
    if kind is bool:
        annotation, flag = bool, f"{flag}/--no-{flag.removeprefix('--')}"
    elif issubclass(kind, Enum):
        metavar = f"<{'|'.join(choices_of(name))}>"
    elif kind is tuple:
        annotation, metavar = list[str], "TEXT"
    option = typer.Option(flag, help=_help_of(name), metavar=metavar, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,  # "not given": the value then comes from the environment or the default
        annotation=Annotated[annotation | None, option],
    )


def _help_of(name: str) -> str:
    default = default_of(name)
    facts = [
        *([f"default: {default}"] if default is not None else []),
        *([range_of(name)] if range_of(name) else []),  # choices stand behind the flag
        f"env: {variable_of(name)}",
    ]
    return f"{Settings.model_fields[name].description} [{'; '.join(facts)}]"
