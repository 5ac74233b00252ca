from __future__ import annotations

import gc
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from embedstream.api.chat import texts_of
from embedstream.api.inputs import Conversations
from embedstream.api.schemas import ChatFields
from embedstream.api.templates import ChatTemplate, TemplateOverflow, TemplateTimeout, compiled
from embedstream.shared.cards import ChatFormat
from embedstream.shared.settings import Settings

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{%- if tools %}{{ raise_exception('no tools here') }}{%- endif %}
{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim + '\\n\\n' %}{% set rest = messages[1:] %}
{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 %}{% set content = system ~ message.content %}
    {% else %}{% set content = message.content %}{% endif %}
    {% if message.role == 'user' %}[INST] {{ content | trim }} [/INST]{% else %}
        {% generation %} {{ content | trim }} {{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""

PARTS = """{%- set ns = namespace(images=0, texts=[]) -%}
{%- for message in messages %}{{ message.role | upper }}:{% if message.tool_calls is defined %}!{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{% if part.type == 'text' %}<{{ part.text }}>{% endif %}{% endfor %}
{%- endif %}
{% if loop.index > 9 %}{% break %}{% endif %}
{%- endfor %}{{ {'b': messages | length, 'a': 'é<'} | tojson(sort_keys=true) }}{{ dict(a=1).a }}{{ ns.images }}
{{- instruction | default('none') }}"""

TRIMMED = "{% for message in messages %}{{ message.content | trim }}{% if not loop.last %}|{% endif %}{% endfor %}"

SYSTEM = {"role": "system", "content": "Be brief. "}
USER = {"role": "user", "content": " What is 2 < 3? "}
ANSWER = {"role": "assistant", "content": "True é.", "tool_calls": None}

CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ANSWER], [SYSTEM, USER, ANSWER, USER], [USER, ANSWER] * 4]


def reference(template: str, conversation: list[dict[str, Any]], **options: Any) -> str:
    make: Any = PreTrainedTokenizerFast  # not annotated
    tokenizer = make(
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),  # noqa: S106  # no password
        **SPECIAL,
    )
    text: str = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **options)
    return text


async def ours(template: str, conversation: list[dict[str, Any]], **options: Any) -> str:
    fields = ChatFields(**options)
    chat = ChatFormat({"default": template}, SPECIAL)
    (text,) = await texts_of(Conversations([conversation], "messages"), fields, chat, Settings())
    return text


def as_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM makes of messages for templates that go through the parts of a content."""
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in conversation]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, LLAMA, PARTS, TRIMMED])
@pytest.mark.parametrize("prompt", [False, True])
async def test_texts_equal_those_of_transformers(
    template: str, conversation: list[dict[str, Any]], prompt: bool
) -> None:
    given = as_parts(conversation) if template is PARTS else conversation
    expected = reference(template, given, add_generation_prompt=prompt)
    assert await ours(template, conversation, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, LLAMA, PARTS, TRIMMED])
async def test_an_unfinished_message_equals_that_of_transformers(
    template: str, conversation: list[dict[str, Any]]
) -> None:
    given = as_parts(conversation) if template is PARTS else conversation
    expected = reference(template, given, continue_final_message=True)
    assert await ours(template, conversation, continue_final_message=True) == expected


async def test_variables_of_the_template() -> None:
    expected = reference(PARTS, as_parts([USER]), instruction="x")
    assert await ours(PARTS, [USER], chat_template_kwargs={"instruction": "x"}) == expected
    assert expected.endswith("0x")
    assert await ours("{{ bos_token }}", [USER], chat_template_kwargs={"bos_token": "!"}) == "!"


@pytest.mark.parametrize(
    ("template", "takes_parts"),
    [
        (CHATML, False),
        (LLAMA, False),
        (PARTS, True),
        ("{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c | list %}{{ p }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m.content %}{% for p in m.parts %}{{ c }}{% endfor %}{% endfor %}", False),
    ],
)
def test_what_templates_want_as_content(template: str, takes_parts: bool) -> None:
    assert ChatTemplate(template).takes_parts is takes_parts


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ dict.__call__() }}",
    "{{ dict.update(messages[0], {'a': 1}) }}",
    "{% for i in range(1000000) %}{% endfor %}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include 'x' %}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ 'a' * 999999999 }}",
    "{{ 9999999 * ['a'] }}",
    "{{ 10 ** (10 ** 9) > 1 }}",
    "{% set ns = namespace(x=9) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_holds(template: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises((jinja2.TemplateError, OverflowError, TypeError)):
        ChatTemplate(template).render({"messages": messages}, most_chars=100, deadline_s=math.inf)
    assert messages == [{"role": "user", "content": "a"}]


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"


NO_CALLS = "{% set x = range(99999) %}{% for a in x %}{% for b in x %}{% set c = b %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("source", [ENDLESS, NO_CALLS])
def test_an_endless_template_is_given_up(source: str) -> None:
    before = sys.gettrace()
    with pytest.raises(TemplateTimeout):
        ChatTemplate(source).render({}, most_chars=100, deadline_s=time.monotonic() + 0.05)
    assert sys.gettrace() is before


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(9) | slice(99999999) | list | length }}",
        "{{ lipsum(99999, false) | length }}",
    ],
)
def test_filters_that_loop_are_given_up(source: str) -> None:
    deadline_s = time.monotonic() + 0.05
    with pytest.raises(TemplateTimeout):
        ChatTemplate(source, deadline_s=deadline_s).render({}, most_chars=100, deadline_s=deadline_s)


class Late:
    """Something that can be weakly referred to."""


class Slow:
    """Takes long to go, by its own finalizer."""

    def __del__(self) -> None:
        time.sleep(0.1)
        self.gone = True  # a line past the deadline


def _drop_slow() -> str:
    Slow()
    return ""


def _drop_finalized() -> str:
    late = Late()
    weakref.finalize(late, lambda: time.sleep(0.1))
    del late
    return ""


def _drop_generator() -> str:
    def numbers() -> Iterator[int]:
        try:
            yield 1
        finally:
            time.sleep(0.1)
            time.sleep(0)

    next(numbers())
    return ""


def _drop_template() -> str:
    """A generator that renders a text at its end."""
    text = ChatTemplate("{% set a = sleep(0.1) %}{{ a }}")._template.generate(sleep=time.sleep)

    def numbers() -> Iterator[int]:
        try:
            yield 1
        finally:
            list(text)

    next(numbers())
    return ""


def _collect_garbage() -> str:
    def callback(phase: str, info: object) -> None:
        del phase, info
        time.sleep(0.1)
        time.sleep(0)

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)
    return ""


@pytest.mark.parametrize("drop", [_drop_slow, _drop_finalized, _drop_generator, _drop_template, _collect_garbage])
def test_what_python_ignores_amid_a_template_does_not_save_it(drop: Callable[[], str]) -> None:
    """What finalizers raise nobody hears; pytest tells of it all the same."""
    lines: list[int] = []
    source = "{{ drop() }}{% for a in range(9) %}{{ line(a) }}{% endfor %}"
    with pytest.raises(TemplateTimeout):
        ChatTemplate(source).render(
            {"drop": drop, "line": lines.append}, most_chars=100, deadline_s=time.monotonic() + 0.05
        )
    assert lines == []


def test_a_generator_of_jinja_that_is_dropped_past_the_deadline_does_not_save_a_template() -> None:
    """Closing one is no line of the template's, though its code is Jinja's."""
    lines: list[int] = []
    held = [jinja2.filters.sync_do_slice(["a"], 3)]
    next(held[0])

    def drop() -> str:
        time.sleep(0.1)
        held.clear()
        return ""

    source = "{{ drop() }}{% for a in range(9) %}{{ line(a) }}{% endfor %}"
    with pytest.raises(TemplateTimeout):
        ChatTemplate(source).render(
            {"drop": drop, "line": lines.append}, most_chars=100, deadline_s=time.monotonic() + 0.05
        )
    assert lines == []


def test_a_template_that_ends_too_late_is_given_up() -> None:
    """By other code, after which Jinja runs no line of its own."""
    with pytest.raises(TemplateTimeout):
        ChatTemplate("{{ sleep(0.1) }}").render(
            {"sleep": time.sleep}, most_chars=100, deadline_s=time.monotonic() + 0.05
        )


def test_compiling_calculates_nothing() -> None:
    large = "'abc' | slice(99999999) | list | length"
    ChatTemplate(f"{{{{ {large} }}}}{{% set a = {large} %}}", deadline_s=time.monotonic() + 2)


def test_compiling_is_given_up() -> None:
    with pytest.raises(TemplateTimeout):
        ChatTemplate("{{ a }}" * 9999, deadline_s=time.monotonic() + 0.05)


def test_templates_calculate() -> None:
    source = "{{ 3 * 4 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ '-' * 3 }} {{ 2 * [1] }} {{ 0.5 * 4 }} {{ 2 ** 0.5 > 1.4 }}"
    text = ChatTemplate(source).render({}, most_chars=100, deadline_s=math.inf)
    assert text == "12 1024 0.5 --- [1, 1] 2.0 True"


def test_too_much_text_is_given_up() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}ab{% endfor %}{% endfor %}")
    with pytest.raises(TemplateOverflow):
        template.render({}, most_chars=1000, deadline_s=math.inf)
    assert ChatTemplate("ab").render({}, most_chars=2, deadline_s=math.inf) == "ab"


def test_templates_of_models_are_compiled_once() -> None:
    assert compiled(CHATML) is compiled(CHATML)
