"""OpenAPI 3.1 of this server, from the models that check requests and the table of errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from embedstream.shared.settings import Settings

from . import answer_models
from .errors import MAX_RETRY_AFTER_S, statuses
from .keys import METRICS_PATH, OPEN_PATHS
from .operations import OPERATIONS, QUOTA_HEADERS, REQUEST_BODIES, Operation

JsonObject = dict[str, Any]

_REFS = "#/components/schemas/{model}"
_ERROR = answer_models.ErrorBody.__name__
_ANSWERS = [
    model
    for model in vars(answer_models).values()
    if inspect.isclass(model) and issubclass(model, BaseModel) and not model.__name__.startswith("_")
    if model.__module__ == answer_models.__name__
]
_ANYWHERE = (400, 408, 413, 415, 431, 500, 503)
"""Statuses that any request may meet, before it is looked at closely."""

_TEXT: JsonObject = {"type": "string"}
_PART: JsonObject = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_CONVERSATION: JsonObject = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": _TEXT, "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}},
    },
}
_IDS: JsonObject = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_MESSAGES = [_CONVERSATION, {"type": "array", "minItems": 1, "items": _CONVERSATION}]
_TEXTS: JsonObject = {"type": "array", "minItems": 1, "items": _TEXT}
# What is checked by hand, because pydantic would try each of these forms, and each number of 300,000.
_BY_HAND: Mapping[str, JsonObject] = {
    "input": {"anyOf": [_TEXT, _TEXTS, _IDS, {"type": "array", "minItems": 1, "items": _IDS}, *_MESSAGES]},
    "messages": {"anyOf": _MESSAGES},
    "prompt": _TEXT,
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "media_io_kwargs": {"type": "object", "additionalProperties": {"type": "object"}},
}
_SUBJECTS = ("input", "messages", "prompt", "tokens")
"""What a request is about. All other fields may be null."""

_HEADERS: Mapping[str, JsonObject] = {
    "x-request-id": {"description": "The request's own, or one made here.", "schema": _TEXT},
    "x-should-retry": {"description": "`false` on errors that would come again.", "schema": {"const": "false"}},
    "Retry-After": {
        "description": "Seconds to wait before the next try.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_RETRY_AFTER_S},
    },
    "Allow": {"description": "The methods of the path.", "schema": _TEXT},
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"const": "Bearer"}},
    "Accept-Encoding": {"description": "The codings of bodies there are.", "schema": _TEXT},
    **{name: {"description": text, "schema": _TEXT} for name, text in QUOTA_HEADERS.items()},
}
_OF_STATUS = {
    401: ["WWW-Authenticate"],
    405: ["Allow"],
    409: [*QUOTA_HEADERS],
    415: ["Accept-Encoding"],
    429: ["Retry-After", *QUOTA_HEADERS],
    500: [*QUOTA_HEADERS],
    503: ["Retry-After", *QUOTA_HEADERS],
    504: [*QUOTA_HEADERS],
}


def document(settings: Settings) -> JsonObject:
    """The whole description.

    Args:
        settings: whether keys are set, and which paths need one.
    """
    keyed = bool(settings.api_key) or settings.api_keys_file is not None
    schemas, errors = _schemas(), statuses()
    paths: dict[str, JsonObject] = {}
    for operation in OPERATIONS:
        open_to_all = operation.path in OPEN_PATHS or (settings.metrics_open and operation.path == METRICS_PATH)
        locked = keyed and not open_to_all
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, locked=locked)
    schemas |= {f"Error{status}": _error_schema(schemas, status, types) for status, types in errors.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedstream",
            "version": metadata.version("embedstream"),
            "summary": "Vectors of texts, in the form of OpenAI's and vLLM's APIs.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {f"Error{status}": _error_answer(status, types) for status, types in errors.items()},
            "headers": dict(_HEADERS),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas() -> dict[str, JsonObject]:
    """Schemas of all bodies by the name of their model; texts come from the docstrings."""
    models = [*REQUEST_BODIES, *_ANSWERS]
    _, generated = models_json_schema([(model, "validation") for model in models], ref_template=_REFS)
    schemas: dict[str, JsonObject] = {model.__name__: generated["$defs"][model.__name__] for model in models}
    for model in models:
        schema, told = schemas[model.__name__], dict(_told(model))
        schema["description"] = _beginning(model)
        for name, field in schema.get("properties", {}).items():
            field.pop("title", None)
            field["description"] = told[name]
    for model in REQUEST_BODIES:
        _loosen(schemas[model.__name__])
    return schemas


def _loosen(schema: JsonObject) -> None:
    """What only bodies of requests have: fields checked by hand, and nulls that mean "absent"."""
    properties, required = schema["properties"], schema.get("required", ())
    for name in [name for name in properties if name not in _SUBJECTS]:
        properties[name] = properties.pop(name)  # behind those
    for name, by_hand in _BY_HAND.items():
        if name in properties:
            properties[name] = {"description": properties[name]["description"], **by_hand}
    if "messages" in properties:
        other = "input" if "input" in properties else "prompt"
        schema["anyOf"] = [{"required": [other]}, {"required": ["messages"]}]
    for name, field in properties.items():
        choices = field.get("anyOf", ())
        if name not in (*required, *_SUBJECTS) and {"type": "null"} not in choices:
            typed = {key: field.pop(key) for key in [*field] if key not in ("description", "default")}
            field["anyOf"] = [typed, {"type": "null"}]


def _told(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each field with what the docstrings of the model and its bases say of it."""
    for base in reversed(model.__mro__):
        _, _, args = (inspect.getdoc(base) or "").partition("\nArgs:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE):
            yield name, _sentence(re.sub(r"\s+", " ", text).replace("None", "null"))


def _beginning(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").partition("\nArgs:\n")[0].strip()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _operation(operation: Operation, *, locked: bool) -> JsonObject:
    answers: dict[str, JsonObject] = {"200": _answer(operation)}
    expected = {*_ANYWHERE, *operation.errors, *((401,) if locked else ())}
    answers |= {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in sorted(expected)}
    described: JsonObject = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
        "parameters": [parameter.described() for parameter in operation.parameters],
        "responses": answers,
    }
    if operation.body is not None:
        examples = {name: {"value": value} for name, value in operation.examples.items()}
        content = {"schema": {"$ref": _REFS.format(model=operation.body.__name__)}, "examples": examples}
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    if locked:
        described["security"] = [{"bearer": []}]
    return described


def _answer(operation: Operation) -> JsonObject:
    headers: JsonObject = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
    for name, description in operation.answer_headers.items():
        headers[name] = {"description": description, "schema": _TEXT}
    content: JsonObject = {}
    for media_type, model in operation.answers.items():
        content[media_type] = {} if model is None else {"schema": {"$ref": _REFS.format(model=model.__name__)}}
        if operation.example is not None and model is not None:
            content[media_type]["example"] = operation.example
    return {"description": operation.answer, "headers": headers, "content": content}


def _error_schema(schemas: Mapping[str, JsonObject], status: int, types: list[str]) -> JsonObject:
    fields = schemas[answer_models.ErrorFields.__name__]
    properties = fields["properties"] | {"code": {"const": status}, "type": {"enum": types}}
    return {**schemas[_ERROR], "title": f"Error{status}", "properties": {"error": fields | {"properties": properties}}}


def _error_answer(status: int, types: list[str]) -> JsonObject:
    names = ["x-request-id", "x-should-retry", *_OF_STATUS.get(status, ())]
    return {
        "description": " or ".join(f"`{kind}`" for kind in types),
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {"application/json": {"schema": {"$ref": _REFS.format(model=f"Error{status}")}}},
    }
