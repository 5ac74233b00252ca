"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, and of token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import PlainValidator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import MAX_WHOLE_CHARS
from embedstream.shared.errors import InputTooLong, ModelNotFound, Unavailable
from embedstream.shared.settings import Settings

from . import inputs
from .answering import Answering
from .chat import texts_of
from .disconnect import unless_hung_up
from .inputs import Conversations
from .schemas import Body, ChatFields, Missing, read
from .streaming import PiecedResponse

T = TypeVar("T")

_ON_LOOP_CHARS = 2_000
"""Texts up to this size are tokenised on the event loop (about 1 ms); a thread costs 0.1 ms."""
_AT_ONCE_CHARS = 200_000
"""Larger ones wait for one another: while it is tokenised, a text takes 200 bytes of memory a character."""
_ON_LOOP_IDS = 1_000
_PIECE_IDS = 50_000


def _read_messages(value: object) -> Conversations:
    conversations = inputs.read_messages(value)
    if len(conversations) > 1 or (isinstance(value, list) and value and isinstance(value[0], list)):
        raise PydanticCustomError("messages_type", "Input should be the messages of one conversation")
    return conversations


def _read_prompt(value: object) -> str:
    if isinstance(value, Missing):
        raise PydanticCustomError("missing", "Field required")
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


def _read_ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise PydanticCustomError("list_type", "Input should be a valid list")
    ids = inputs.read_ids(value)
    if ids and min(ids) < 0:
        raise PydanticCustomError("greater_than_equal", "Input should be greater than or equal to 0")
    return ids


class TokenizeRequest(ChatFields):
    """The body of POST /tokenize.

    Args:
        prompt: a text.
        messages: those of one conversation; not looked at beside a `prompt`.
        return_token_strs: whether the answer also has the vocabulary's entries.
        add_generation_prompt: as for embeddings, but on by default, as in vLLM.
    """

    prompt: Annotated[str | None, PlainValidator(_read_prompt)] = None
    messages: Annotated[Conversations | None, PlainValidator(_read_messages)] = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True

    @classmethod
    def _chosen(cls, given: dict[str, Any]) -> dict[str, Any]:
        if "prompt" not in given and "messages" not in given:
            given["prompt"] = Missing(tuple(given))
        if "prompt" in given:
            return {name: value for name, value in given.items() if name in _OF_PROMPTS}
        if given.get("continue_final_message"):
            given.setdefault("add_generation_prompt", False)
        return given


_OF_PROMPTS = frozenset({"model", "prompt", "add_special_tokens", "return_token_strs", "continue_final_message"})


class DetokenizeRequest(Body):
    """The body of POST /detokenize.

    Args:
        tokens: token ids.
    """

    tokens: Annotated[list[int], PlainValidator(_read_ids)]


class Tokenizing:
    """The two endpoints, with what they need. They work while no consumer is alive, once one has been.

    Args:
        answering: finds the model.
        settings: of chat messages.
    """

    def __init__(self, answering: Answering, settings: Settings) -> None:
        self._answering = answering
        self._settings = settings
        self._one_large = asyncio.Lock()

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, which may be longer than the model reads, or of a conversation.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        body = await read(request, TokenizeRequest, self._settings)
        served = await self._served(body.model)
        special = body.add_special_tokens
        if body.prompt is None:
            assert body.messages is not None  # noqa: S101 (`_chosen` leaves one of the two)
            (text,) = await texts_of(body.messages, body, served.card.chat, self._settings)
            special = bool(special)
        else:
            text, special = body.prompt, special is not False

        def answer() -> list[bytes]:
            ids = served.tokenizer.encode([text], add_special_tokens=special).ids
            strings = served.tokenizer.token_strings(ids.tolist()) if body.return_token_strs else None
            return list(_tokenized(ids, strings, served.card.recipe.max_length))

        if len(text) <= _ON_LOOP_CHARS:
            pieces = answer()
        elif len(text) <= _AT_ONCE_CHARS:
            pieces = await asyncio.to_thread(answer)
        elif len(text) <= MAX_WHOLE_CHARS:
            pieces = await unless_hung_up(request.receive, self._alone(answer))
        else:
            message = f"The text has {len(text)} characters; at most {MAX_WHOLE_CHARS} are taken."
            raise InputTooLong(message, param="prompt" if body.prompt is not None else "messages")
        return PiecedResponse(pieces, {}, "application/json")

    async def _alone(self, work: Callable[[], T]) -> T:
        async with self._one_large:
            return await asyncio.to_thread(work)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens included.

        Raises:
            SchemaError, EmbedstreamError: answered as `errors.TABLE` says.
        """
        body = await read(request, DetokenizeRequest, self._settings)
        served = await self._served(body.model)

        def answer() -> bytes:
            return orjson.dumps({"prompt": served.tokenizer.decode(body.tokens)})

        content = answer() if len(body.tokens) <= _ON_LOOP_IDS else await asyncio.to_thread(answer)
        return PiecedResponse([content], {}, "application/json")

    async def _served(self, name: str) -> ServedModel:
        try:
            served = await self._answering.served(name)
        except ModelNotFound as error:
            raise ModelNotFound(error.model, known=error.known, param="model") from error
        if served is None:
            raise Unavailable("No consumer has told the model's tokenizer yet.", retry_after_s=2.0)
        return served


def _tokenized(ids: NDArray[np.uint32], strings: Sequence[str] | None, max_length: int) -> list[bytes]:
    """The answer in pieces, so that no other thread waits for long while it is made."""
    head = orjson.dumps({"count": len(ids), "max_model_len": max_length})[:-1]
    pieces = [head, b',"tokens":', *_list(ids)]
    pieces += [b',"token_strs":', *(_list(strings) if strings is not None else [b"null"]), b"}"]
    return pieces


def _list(values: NDArray[np.uint32] | Sequence[str]) -> list[bytes]:
    """A JSON list in pieces."""
    blocks = (values[first : first + _PIECE_IDS] for first in range(0, len(values), _PIECE_IDS))
    lists = [orjson.dumps(block, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for block in blocks]
    return [b"[", b",".join(lists), b"]"]
