"""Chat templates: Jinja in a sandbox, with the names that transformers gives them, and bounds of time and size.

Source: `transformers.utils.chat_template_utils` (Apache-2.0); a test compares the two.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_CODE_NAME = "<template>"
"""The file name that Jinja gives the code it makes of a template."""


class TemplateTimeout(Exception):
    """The template ran for too long."""


class TemplateOverflow(Exception):
    """The template made too much text."""


class ChatTemplate:
    """One template, compiled.

    Args:
        source: Jinja.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """

    def __init__(self, source: str) -> None:
        environment = _environment()
        self.takes_parts = _loops_over_content(environment.parse(source))
        """Whether it goes through the parts of a content by itself; if not, it wants a text."""
        self._template = environment.from_string(source)

    def render(self, variables: Mapping[str, Any], *, most_chars: int, deadline_s: float) -> str:
        """The text that the template makes.

        Args:
            variables: JSON values by name.
            most_chars: of text.
            deadline_s: when it is given up, on the monotonic clock.

        Raises:
            TemplateTimeout, TemplateOverflow: past the bounds.
            Exception: whatever the template's code raises, and jinja2.TemplateError by its own will.
        """
        pieces, chars = [], 0
        with _given_up_at(deadline_s):
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                chars += len(piece)
                if chars > most_chars:
                    raise TemplateOverflow
        return "".join(pieces)


@lru_cache(maxsize=16)
def compiled(source: str) -> ChatTemplate:
    """A template of a model; they stay the same, and compiling one takes tens of milliseconds."""
    return ChatTemplate(source)


@contextmanager
def _given_up_at(deadline_s: float) -> Iterator[None]:
    """Ends template code in this thread that runs past a moment.

    A thread cannot be ended from outside, and a loop that writes nothing passes no code of ours; but Python calls the
    tracer of a thread before each line, and what the tracer raises is raised there.
    """

    def each_line(frame: FrameType, event: str, arg: object) -> Any:
        del frame, event, arg
        if time.monotonic() > deadline_s:
            raise TemplateTimeout
        return each_line

    def each_call(frame: FrameType, event: str, arg: object) -> Any:
        return each_line(frame, event, arg) if frame.f_code.co_filename == _CODE_NAME else None

    before = sys.gettrace()
    sys.settrace(each_call)
    try:
        yield
    finally:
        sys.settrace(before)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks what an assistant said; for us it is its content alone."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace that keeps no names with an underscore in front, so that none of Python's own can be reached."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        names = dict(*given, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace keeps no names with an underscore in front ({name!r})")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _loops_over_content(template: nodes.Template) -> bool:
    """Whether some loop goes through the `content` of a message, itself or under another name."""
    aliases = {
        node.target.name
        for node in template.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _is_content(node.node, set())
    }
    return any(_is_content(loop.iter, aliases) for loop in template.find_all(nodes.For))


def _is_content(node: nodes.Node | None, aliases: set[str]) -> bool:
    while isinstance(node, nodes.Filter):  # such as message.content | list
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in aliases
