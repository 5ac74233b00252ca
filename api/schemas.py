"""The bodies of requests: read, checked and put in the producer's terms.

Pydantic checks the scalars, with its lax coercions ("8" is 8, 8.5 is an error); `inputs` has the forms of the rest.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from embedstream.producer import LongInputs, Options, VectorType
from embedstream.shared.jobs import TruncationSide
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Recipe
from embedstream.shared.settings import Settings

from . import inputs
from .inputs import Conversations, Inputs
from .parsing import json_object, refusal, schema_error

# Literals, not enums: pydantic then reports a wrong value as `literal_error`, the word that tests of clients look for.
EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]
Side = Literal["left", "right"]
Padding = Literal["max_length", "do_not_pad"]
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify", "plugin"]

_SIDES = {None: TruncationSide.MODEL, "right": TruncationSide.RIGHT, "left": TruncationSide.LEFT}
_NOT_IN_SALT = "@/\\\0"
_MAX_SALT_CHARS = 128
_INT64 = 2**63

ON_LOOP_BYTES = 16 * 1024
"""Bodies up to this size are read on the event loop (about 1 ms at worst); a thread costs 0.1 ms."""


@dataclass(frozen=True, slots=True)
class Missing:
    """What stands for the input of a body that has none, so that this is told beside all else that is wrong.

    Args:
        given: the fields the body has instead; one of them may be a typing error.
    """

    given: tuple[str, ...]


def _read_input(value: object) -> Inputs | Conversations:
    if isinstance(value, Missing):
        raise PydanticCustomError("missing", "Field required")
    return inputs.read_input(value)


class Body(BaseModel):
    """What all bodies share: a null counts as absent, and unknown fields are ignored.

    Args:
        model: a served name; "" is whatever is served.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str = ""

    @classmethod
    def parse(cls, content_type: str, body: bytes, most_values: int | None = None) -> Self:
        """Read a request's body.

        Args:
            content_type: the header; parameters such as a charset are allowed.
            body: JSON.
            most_values: in it; None for any number.

        Raises:
            SchemaError: not JSON, or not of this form.
            InvalidInput: the form is right, but two fields contradict each other or ask for what is not offered.
        """
        try:
            request = cls.model_validate(cls._chosen(json_object(content_type, body, most_values)))
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            for problem in problems:
                if isinstance(problem["input"], Missing):
                    problem["input"] = [*problem["input"].given]
            path = ".".join(map(str, ("body", *problems[0]["loc"])))
            raise schema_error(problems, path) from None
        request._check()
        return request

    @classmethod
    def _chosen(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields that count, of those that were given."""
        return given

    def _check(self) -> None:
        """Refuse fields that have the right form and cannot be served.

        Raises:
            InvalidInput: naming the field.
        """


class ChatFields(Body):
    """How chat messages become text; without effect on inputs of another form.

    Args:
        add_special_tokens: whether the tokenizer adds [CLS] and its like: None for yes, but no to chat messages, where
            the template does it.
        add_generation_prompt: end with what begins an answer of the assistant.
        continue_final_message: end within the last message.
        chat_template: instead of the model's own; only where the server trusts requests with it.
        chat_template_kwargs: variables of the template.
        media_io_kwargs: without effect: no media are read.
    """

    add_special_tokens: bool | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    media_io_kwargs: Annotated[dict[str, dict[str, Any]], PlainValidator(inputs.read_objects)] = Field(
        default_factory=dict
    )

    def _check(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
            raise refusal(message, "continue_final_message", value=True)


CHAT_ONLY = ChatFields.model_fields.keys() - Body.model_fields.keys() - {"add_special_tokens"}
"""Fields that count beside chat messages alone."""


class InputRequest(ChatFields):
    """What /v1/embeddings and /pooling share.

    Args:
        input: texts, token ids (which get no special tokens), or chat messages.
        messages: chat messages; not looked at beside an `input`.
        encoding_format: the form of the vectors in the response.
        dimensions: keep this many components; None keeps all.
        normalize: scale to unit length; None does what the model does.
        use_activation: another name of `normalize`.
        truncate_prompt_tokens: cut inputs to this many tokens; -1 for the model's limit, None leaves it to the server.
        truncation_side: the end that loses tokens, special tokens and all; None keeps those.
        padding: whether usage counts inputs as padded to their limit; the vectors are the same.
        embed_dtype: number format of the vectors, except in the form `float`.
        endianness: their byte order, except in the form `float`.
        user: without effect.
        request_id: names the response where the request has no header `X-Request-Id`.
        priority: without effect; see the header `x-lane`.
        cache_salt: without effect.
        mm_processor_kwargs: must be empty.
        prompt_name: the prompt of the model that is put before each text; None for the model's default, "" for none.
        input_type: what the texts are for, `query`, `document` or another word for these, by which the model's prompt
            and adapter are found; without effect where the model has neither.
    """

    input: Annotated[Inputs | Conversations | None, PlainValidator(_read_input)] = None
    messages: Annotated[Conversations | None, PlainValidator(inputs.read_messages)] = None
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    truncation_side: Side | None = None
    padding: Padding = "do_not_pad"
    embed_dtype: EmbedDtype = "float32"
    endianness: Endianness = "native"
    user: str | None = None
    request_id: str | None = None
    priority: int = Field(0, ge=-_INT64, lt=_INT64)
    cache_salt: str | None = None
    mm_processor_kwargs: dict[str, Any] = Field(default_factory=dict)
    prompt_name: str | None = None
    input_type: str | None = None

    @classmethod
    def _chosen(cls, given: dict[str, Any]) -> dict[str, Any]:
        if "input" in given:
            given.pop("messages", None)
        elif "messages" not in given:
            given["input"] = Missing(tuple(given))
        if "messages" not in given and not inputs.is_chat(given["input"]):
            for name in CHAT_ONLY:
                given.pop(name, None)
        return given

    def _check(self) -> None:
        super()._check()
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            message = (
                f"`normalize` ({self.normalize}) and `use_activation` ({self.use_activation}) mean the same "
                "and must not differ."
            )
            raise refusal(message, "normalize", self.normalize)
        salt = self.cache_salt
        if salt is not None and not (0 < len(salt) <= _MAX_SALT_CHARS and not set(salt) & set(_NOT_IN_SALT)):
            message = f"`cache_salt` must have 1 to {_MAX_SALT_CHARS} characters, none of them '@', '/', '\\' or NUL."
            raise refusal(message, "cache_salt", salt)
        if self.mm_processor_kwargs:
            message = "`mm_processor_kwargs` must be empty: this server reads text only."
            raise refusal(message, "mm_processor_kwargs", self.mm_processor_kwargs)

    @property
    def given(self) -> Inputs | Conversations:
        """The inputs, in whichever field they came; `chat.rendered` makes texts of conversations."""
        value = self.messages if self.input is None else self.input
        assert value is not None  # noqa: S101 (`_chosen` leaves one of the two)
        return value

    def options(self, settings: Settings) -> Options:
        """What the producer is to do, as far as the body alone tells it; `prompts` adds what the model must have.

        Args:
            settings: what becomes of long inputs when the request does not say.
        """
        return Options(
            self._vector_options(),
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            long_inputs=LongInputs[settings.long_inputs_policy.name],
            truncation_side=_SIDES[self.truncation_side],
            add_special_tokens=self.adds_special_tokens,
        )

    @property
    def adapter(self) -> str | None:
        """The adapter of the model that is asked for; None for no choice."""
        return None

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer is to add special tokens."""
        if self.add_special_tokens is None:
            return not isinstance(self.given, Conversations)
        return self.add_special_tokens

    def _vector_options(self) -> VectorOptions:
        dtype = VectorType.FLOAT32 if self.encoding_format == "float" else VectorType(self.embed_dtype)
        normalize = self.use_activation if self.normalize is None else self.normalize
        return VectorOptions(self.dimensions, normalize, dtype)

    def padded_to(self, recipe: Recipe) -> int:
        """Tokens that usage counts for an input at least: padding is counted as in vLLM, though none is computed.

        Args:
            recipe: the model's limit.
        """
        if self.padding == "do_not_pad":
            return 0
        limit = self.truncate_prompt_tokens
        return recipe.max_length if limit is None or limit == -1 else limit


class EmbeddingRequest(InputRequest):
    """The body of POST /v1/embeddings.

    Args:
        task: an adapter of the model; None for the one that `input_type` stands for, else the model's default.
    """

    task: str | None = None

    @property
    def adapter(self) -> str | None:
        """The adapter of the model that is asked for; None for no choice."""
        return self.task


class PoolingRequest(InputRequest):
    """The body of POST /pooling.

    Args:
        task: what to make of an input: one vector, or one for each token; None does what the model is served with.
    """

    task: PoolingTask | None = None


T = TypeVar("T", bound=Body)


async def read(request: Request, kind: type[T], settings: Settings) -> T:
    """Read and check the body of a request; a large one in a thread.

    Raises:
        SchemaError, InvalidInput: as `Body.parse` says.
    """
    content_type, most_values = request.headers.get("content-type", ""), settings.max_body_values
    pieces = [piece async for piece in request.stream()]
    if sum(map(len, pieces)) <= ON_LOOP_BYTES:
        return kind.parse(content_type, b"".join(pieces), most_values)
    return await asyncio.to_thread(lambda: kind.parse(content_type, b"".join(pieces), most_values))
