"""Chat templates: Jinja in a sandbox, with the names that transformers gives them, and bounds of time and size.

Source: `transformers.utils.chat_template_utils` (Apache-2.0); a test compares the two.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MOST_ITEMS = 1_000_000
"""Of a text or list that `*` makes."""
_MOST_BITS = 100_000
"""Of a number that `*` or `**` makes: what has more is calculated in one step that nothing can end."""


class TemplateTimeout(BaseException):
    """The template ran for too long. No `Exception`, so that no code of Jinja's takes it for a template's error."""


class TemplateOverflow(Exception):
    """The template made too much text."""


class ChatTemplate:
    """One template, compiled.

    Args:
        source: Jinja.
        deadline_s: when compiling is given up, on the monotonic clock.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
        TemplateTimeout: past the deadline.
    """

    def __init__(self, source: str, *, deadline_s: float = math.inf) -> None:
        environment = _Environment()
        with _given_up_at(deadline_s):
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
    """Ends code in this thread that runs past a moment.

    A thread cannot be ended from outside, and a loop that writes nothing passes no code of ours; but Python calls the
    tracer of a thread before each line, and what the tracer raises is raised there. That holds for Jinja's own code
    too, whose filters have loops; what is one step of the interpreter must be bounded by its size.

    Only in lines of the template and of Jinja, and in none while a generator is closed: Python runs finalizers, the
    callbacks of the garbage collector and what generators do at their end between any two lines. It ignores what they
    raise, and has then dropped the tracer. What other code takes too long is given up at Jinja's next line, or here.
    """
    if deadline_s == math.inf:
        yield
        return

    def each_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception" and issubclass(arg[0], GeneratorExit):
            return _closing
        if event == "line" and time.monotonic() > deadline_s and _is_jinja(frame) and not _closes_generator(frame):
            raise TemplateTimeout
        return each_line

    before = sys.gettrace()
    sys.settrace(each_line)
    try:
        yield
    finally:
        sys.settrace(before)
    if time.monotonic() > deadline_s:
        raise TemplateTimeout


_JINJA = str(Path(jinja2.__file__).parent)


def _is_jinja(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file == "<template>" or file.startswith(_JINJA)  # as Jinja names what it compiles from a text


def _closing(frame: FrameType, event: str, arg: Any) -> Any:
    """The tracer of a generator that is being closed."""
    del frame, event, arg
    return _closing


def _closes_generator(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_trace is _closing:
            return True
        frame = frame.f_back
    return False


class _Code(CodeGenerator):
    """Jinja's compiler, but what a template writes is calculated when it is rendered, constant or not.

    Constants would become part of the code: a gigabyte of it from `{{ "a" | center(999999999) }}`.
    """

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with bounds for the operators that make much of little in one step."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Calculate, unless the outcome would be huge."""
        if operator == "**":
            size = left.bit_length() * max(right, 0) if isinstance(left, int) and isinstance(right, int) else 0
            most = _MOST_BITS
        elif isinstance(left, int) and isinstance(right, int):
            size, most = left.bit_length() + right.bit_length(), _MOST_BITS
        else:
            times, items = (left, right) if isinstance(left, int) else (right, left)
            size = len(items) * times if isinstance(times, int) and isinstance(items, Sized) else 0
            most = _MOST_ITEMS
        if size > most:
            raise OverflowError(f"the outcome of `{operator}` is too large for a template")
        return super().call_binop(context, operator, left, right)


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
