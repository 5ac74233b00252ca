"""Settings as people read them: what they may be, what they are by default, what is wrong with one, and their page.

`python -m embedstream.shared.settings_page docs/settings.md` writes the table there anew; `make settings-page` does it.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from .errors import Misconfigured
from .settings import Settings, flag_of, roles_of, variable_of

_SECRET = frozenset({"api_key", "redis_url"})
"""Settings whose values are never repeated: keys, and URLs that may hold a password."""
_HEAD = "| flag | variable | default | may be | commands | meaning |\n| --- | --- | --- | --- | --- | --- |\n"
_TABLE = re.compile(r"^\| flag \|.*\n(?:\|.*\n)*", re.MULTILINE)
_LEAST = {"ge": "at least {}", "gt": "above {}"}
_MOST = {"le": "at most {}", "lt": "below {}"}


def plain_type(name: str) -> type:
    """`int` of a setting that is `int`, `Path` of `Path | None`, `tuple` of `tuple[str, ...]`."""
    annotation: Any = Settings.model_fields[name].annotation
    if get_origin(annotation) in {Union, types.UnionType}:
        annotation = next(part for part in get_args(annotation) if part is not types.NoneType)
    plain: type = get_origin(annotation) or annotation
    return plain


def default_of(name: str) -> str | None:
    """The default as it is written in a variable; None where nothing is set."""
    value = Settings.model_fields[name].default
    return None if value is None or value == () else as_text(value)


def as_text(value: object) -> str:
    """A value in the form its variable has."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def range_of(name: str) -> str:
    """The values a number may have, or the form of a text, in words; "" where there is no such bound."""
    bounds: dict[str, Any] = {}
    for bound in Settings.model_fields[name].metadata:
        for kind in (*_LEAST, *_MOST, "pattern"):
            if getattr(bound, kind, None) is not None:
                bounds[kind] = getattr(bound, kind)
    if "pattern" in bounds:
        return f"`{bounds['pattern'].removeprefix('^').removesuffix('$')}`"
    if "ge" in bounds and "le" in bounds:
        return f"{bounds['ge']} to {bounds['le']}"
    return ", ".join(words[kind].format(bounds[kind]) for words in (_LEAST, _MOST) for kind in words if kind in bounds)


def choices_of(name: str) -> list[str]:
    """The words a setting may be, where it is one of a few."""
    kind = plain_type(name)
    if kind is bool:
        return ["true", "false"]
    return [str(choice.value) for choice in kind] if issubclass(kind, Enum) else []


def problems_of(error: ValidationError, flags: Collection[str] = ()) -> list[str]:
    """One line for each wrong value: where it came from, the value unless it is secret, and what it must be.

    Args:
        error: what `Settings` raised.
        flags: the settings that came from flags; the others came from the environment.
    """
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = str(problem["loc"][0])
        source = flag_of(name) if name in flags else variable_of(name)
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if name not in _SECRET:
            message = f"is {problem['input']!r}, but {message}"
        elif not message.startswith("should "):
            message = f"is {message}"
        lines.append(f"{source} {message}")
    return lines


def read_environment() -> Settings:
    """The settings of the environment, for programs that use the library.

    Raises:
        Misconfigured: naming each variable with a wrong value.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise Misconfigured("; ".join(problems_of(error))) from None


def table() -> str:
    """The table of `docs/settings.md`."""
    return _HEAD + "".join(f"| {' | '.join(_cells(name))} |\n" for name in Settings.model_fields)


def _cells(name: str) -> list[str]:
    default, choices = default_of(name), choices_of(name)
    return [
        f"`{flag_of(name)}`",
        f"`{variable_of(name)}`",
        "" if default is None else f"`{default}`",
        ", ".join(f"`{choice}`" for choice in choices) or range_of(name),
        ", ".join(role.value for role in roles_of(name)),
        str(Settings.model_fields[name].description),
    ]


def rewritten(page: str) -> str:
    """A page with the table as it is now in place of the one it has."""
    return _TABLE.sub(lambda _: table(), page, count=1)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewritten(path.read_text("utf-8")), "utf-8")
