"""Chat messages to texts, with the model's chat template."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import jinja2

from embedstream.producer.fleet import ServedModel
from embedstream.shared.cards import ChatFormat
from embedstream.shared.errors import InvalidInput, NotServed, Unavailable
from embedstream.shared.settings import Settings

from .inputs import Conversation, Conversations, Inputs
from .parsing import refusal
from .schemas import ChatFields, InputRequest
from .templates import ChatTemplate, TemplateOverflow, TemplateTimeout, compiled

_NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the "
    "tokenizer does not define one."
)
_NOT_TRUSTED = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. "
    "Refused request with untrusted chat template."
)
_NO_VARIABLES = frozenset({"chat_template", "tokenize", "messages"})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part, and the field with its text."""
_MEDIA_PARTS = {
    "image": ("image", "image_url", "input_image", "image_pil", "image_embeds"),
    "audio": ("audio", "audio_url", "input_audio", "audio_embeds"),
    "video": ("video", "video_url"),
    "file": ("file", "input_file"),
}
_MOST_TEMPLATE_CHARS = 100_000
"""Of a template that came with a request: the longest in use have about 20,000."""
_SHOWN_CHARS = 200
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


async def rendered(body: InputRequest, served: ServedModel | None, settings: Settings) -> Inputs:
    """The inputs of a request as texts or token ids.

    Args:
        body: of the request.
        served: the model; None while none has been announced.
        settings: bounds, and whether requests may bring templates.

    Raises:
        InvalidInput: the messages cannot be made a text of.
        NotServed: the model's template is damaged.
        Unavailable: there are messages, and nobody has told the template yet.
    """
    inputs = body.given
    if not isinstance(inputs, Conversations):
        return inputs
    if served is None:
        raise Unavailable(
            "Chat messages cannot be read before the first consumer has told the model's chat template; send texts.",
            retry_after_s=2.0,
        )
    return await texts_of(inputs, body, served.card.chat, settings)


async def texts_of(
    conversations: Conversations, fields: ChatFields, chat: ChatFormat | None, settings: Settings
) -> list[str]:
    """Make the text of each conversation, in a thread.

    Args:
        conversations: at least one, each with a message.
        fields: how to.
        chat: of the model's card.
        settings: bounds, and whether requests may bring templates.

    Raises:
        InvalidInput, NotServed: as `rendered` says.
    """
    if not len(conversations):
        raise InvalidInput("You must pass at least one prompt: the list of messages is empty.", param="messages")
    if fields.chat_template is not None and not settings.trust_request_chat_template:
        raise InvalidInput(_NOT_TRUSTED, param="chat_template")
    unexpected = sorted(fields.chat_template_kwargs.keys() & _NO_VARIABLES)
    if unexpected:
        message = f"Found unexpected chat template kwargs from request: {', '.join(unexpected)}."
        raise InvalidInput(message, param="chat_template_kwargs")
    return await asyncio.to_thread(_render_all, conversations, fields, chat, settings)


def _render_all(
    conversations: Conversations, fields: ChatFields, chat: ChatFormat | None, settings: Settings
) -> list[str]:
    deadline_s = time.monotonic() + settings.chat_timeout_s
    try:
        template = _template(fields.chat_template, chat, conversations.param, deadline_s)
    except TemplateTimeout:
        raise _too_slow(settings, "chat_template") from None
    variables = {
        "tools": None,
        "documents": None,
        **(chat.special_tokens if chat is not None else {}),
        **fields.chat_template_kwargs,
        "add_generation_prompt": fields.add_generation_prompt,
    }
    texts: list[str] = []
    left = settings.max_chat_chars
    for index, conversation in enumerate(conversations.each):
        messages = _messages(conversation, index, conversations.param, as_parts=template.takes_parts)
        if fields.continue_final_message:
            _tag_last(messages, index)
        try:
            text = template.render({**variables, "messages": messages}, most_chars=left, deadline_s=deadline_s)
        except TemplateOverflow:
            message = f"The chat messages make more than {settings.max_chat_chars} characters (--max-chat-chars)."
            raise InvalidInput(message, param=conversations.param) from None
        except TemplateTimeout:
            raise _too_slow(settings, conversations.param) from None
        except Exception as error:  # a template is a program: it may raise anything
            message = f"The chat template refuses the conversation at index {index}: {_reason(error)}"
            raise InvalidInput(message, param=conversations.param) from error
        left -= len(text)
        texts.append(_without_tag(text, index) if fields.continue_final_message else text)
    return texts


def _too_slow(settings: Settings, param: str) -> InvalidInput:
    message = f"The chat messages take more than {settings.chat_timeout_s} s to render (--chat-timeout-s)."
    return InvalidInput(message, param=param)


def _template(given: str | None, chat: ChatFormat | None, param: str, deadline_s: float) -> ChatTemplate:
    """The template of the request, by its name among the model's or by itself; else the model's default one."""
    own = chat.templates if chat is not None else {}
    if given is not None and given not in own:
        if len(given) > _MOST_TEMPLATE_CHARS:
            message = f"The chat template has {len(given)} characters; at most {_MOST_TEMPLATE_CHARS} are allowed."
            raise InvalidInput(message, param="chat_template")
        try:
            return ChatTemplate(given, deadline_s=deadline_s)
        except (jinja2.TemplateError, RecursionError) as error:
            message = f"The chat template of the request cannot be read: {_reason(error)}"
            raise InvalidInput(message, param="chat_template") from error
    if not own:
        raise InvalidInput(_NO_TEMPLATE, param=param)
    name = "default" if given is None else given
    if name not in own:
        names = ", ".join(sorted(own))
        message = f"The model has several chat templates and no default: name one as `chat_template` ({names})."
        raise InvalidInput(message, param="chat_template")
    try:
        return compiled(own[name])
    except (jinja2.TemplateError, RecursionError) as error:
        raise NotServed(f"The model's chat template cannot be read: {_reason(error)}") from error


def _messages(conversation: Conversation, index: int, param: str, *, as_parts: bool) -> list[dict[str, Any]]:
    """The messages as templates want them: no nulls, and each content a text, or a list of text parts."""
    if not conversation:
        raise InvalidInput(f"The conversation at index {index} has no message.", param=param)
    messages = []
    for message in conversation:
        texts = _texts(message.get("content"), param)
        content: object = [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)
        given = {name: value for name, value in message.items() if value is not None}
        messages.append(given | {"content": content})
    return messages


def _texts(content: object, param: str) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    assert isinstance(content, list)  # noqa: S101 (`inputs` has seen to it)
    return [part if isinstance(part, str) else _text_of(part, param) for part in content]


def _text_of(part: dict[str, Any], param: str) -> str:
    kind = part.get("type")
    for medium, names in _MEDIA_PARTS.items():
        if kind in names or (kind is None and part.keys() & set(names)):
            raise InvalidInput(f"At most 0 {medium}(s) may be provided in one prompt.", param=param)
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise refusal("A part of a message's content must be a string or have the type `text`.", param, kind)
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidInput(f"A part of type `{kind}` must have a string as its `{_TEXT_PARTS[kind]}`.", param=param)
    return text


def _tag_last(messages: list[dict[str, Any]], index: int) -> None:
    """Mark the end of the last message: what the template puts behind it is taken away again."""
    content = messages[-1]["content"]
    if not content:
        message = f"continue_final_message is set but the last message of the conversation at index {index} is empty."
        raise InvalidInput(message, param="continue_final_message")
    if isinstance(content, str):
        messages[-1]["content"] = content + _TAG
    else:
        content[-1]["text"] += _TAG


def _without_tag(text: str, index: int) -> str:
    place = text.rfind(_TAG.strip())
    if place < 0:
        message = (
            "continue_final_message is set but the chat template leaves out the end of the last message of the "
            f"conversation at index {index}."
        )
        raise InvalidInput(message, param="continue_final_message")
    kept = text[:place]
    # Where the template trims messages, the space before the tag would have been trimmed too.
    return kept if text.startswith(_TAG, place) else kept.rstrip()


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:_SHOWN_CHARS]
