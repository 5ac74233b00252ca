"""Which prompt and which adapter of the model a request asks for."""

from __future__ import annotations

from dataclasses import replace

from embedstream.producer import Options
from embedstream.producer.fleet import ServedModel
from embedstream.shared.errors import InvalidInput, Unavailable
from embedstream.shared.recipe import NO_PROMPT, ROLE, Recipe

from .inputs import Conversations
from .parsing import refusal
from .schemas import InputRequest

_SHOWN_CHARS = 100


def with_prompt_and_adapter(options: Options, body: InputRequest, served: ServedModel | None) -> Options:
    """The options, with the prompt and the adapter that a request asks for.

    Args:
        options: how to treat it otherwise.
        body: of the request.
        served: the model; None while nobody has announced it: its consumer then tells what it has not.

    Raises:
        InvalidInput: the model has no such prompt or adapter, two fields contradict each other, or chat messages are to
            get a prompt.
        Unavailable: whether two fields contradict each other cannot be told yet.
    """
    name, role = body.prompt_name, body.input_type
    by_name = _by_name(name)
    asked = ROLE + role if role else by_name  # with both given too, for a role may also stand for an adapter
    if served is None:
        if role and by_name:
            raise Unavailable(
                "Whether `prompt_name` and `input_type` mean the same prompt cannot be told before the first consumer "
                "has told the model's prompts; send one of them.",
                retry_after_s=2.0,
            )
        if body.adapter == "":  # the queue's word for the default
            raise refusal("`task` must be null or the name of an adapter.", "task", body.adapter)
        return replace(options, prompt=asked, adapter=body.adapter or "")
    recipe = served.card.recipe
    text = _text(recipe, asked, role or name)
    if role and by_name and text != _text(recipe, by_name, name):
        what = f"`prompt_name` and `input_type` ({role[:_SHOWN_CHARS]}) mean different prompts: send one of them."
        raise refusal(what, "prompt_name", name)
    _check_adapter(recipe, body.adapter)
    if not isinstance(body.given, Conversations):
        return replace(options, prompt=asked, adapter=body.adapter or "")
    if asked and text:
        raise InvalidInput(
            "Chat messages get no prompt, for the chat template writes all there is: leave it out, or send texts.",
            param="input_type" if role else "prompt_name",
        )
    return replace(options, prompt=NO_PROMPT, adapter=recipe.adapter_of(body.adapter or "", asked))


def _by_name(name: str | None) -> str:
    """What `Recipe.prompt_of` takes for a prompt's name, "" meaning none."""
    if not name:
        return "" if name is None else NO_PROMPT
    if name == NO_PROMPT or name.startswith(ROLE):  # words between the parts of this server, and no names
        raise refusal(f"No prompt is named `{NO_PROMPT}`, and none begins with `{ROLE}`.", "prompt_name", name)
    return name


def _text(recipe: Recipe, asked: str, given: str | None) -> str:
    """The text of a prompt, "" for none.

    Raises:
        InvalidInput: there is no such prompt; naming those there are, and what was given.
    """
    try:
        return recipe.prompt_text(recipe.prompt_of(asked))
    except InvalidInput as error:
        raise refusal(str(error), error.param or "prompt_name", given) from None


def _check_adapter(recipe: Recipe, adapter: str | None) -> None:
    if adapter is None or adapter in recipe.adapters:
        return
    if not recipe.adapters:
        raise refusal("The model has no adapters to choose from: `task` must be null.", "task", adapter)
    names = ", ".join(f"`{name}`" for name in recipe.adapters)
    raise refusal(f"The model has no such adapter: `task` must be null or one of {names}.", "task", adapter)
