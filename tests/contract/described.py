"""Holds answers against `/openapi.json`."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jsonschema_rs

from .client import Reply


class Description:
    """What a server says of itself.

    Args:
        document: OpenAPI 3.1.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._validator = cache(self._made)

    def _made(self, name: str) -> Any:
        document = {"$ref": f"#/components/schemas/{name}", "components": self._document["components"]}
        return jsonschema_rs.Draft202012Validator(document)

    def check(self, method: str, path: str, reply: Reply) -> None:
        """Compare an answer with what is said of its path, method and status; other paths are none of its matter."""
        found = [item for template, item in self._document["paths"].items() if _matches(template, path)]
        if not found or method.lower() not in found[0]:
            return
        responses = found[0][method.lower()]["responses"]
        assert str(reply.status) in responses, (method, path, reply.status)
        response = responses[str(reply.status)]
        if "$ref" in response:
            response = self._document["components"]["responses"][response["$ref"].rpartition("/")[2]]
        media_type = reply.headers["content-type"].partition(";")[0]
        assert media_type in response["content"], media_type
        schema = response["content"][media_type].get("schema")
        if schema is not None:
            self._validator(schema["$ref"].rpartition("/")[2]).validate(reply.json)
        told = {name.lower() for name in response["headers"]}
        ours = {name for name in reply.headers if name.startswith("x-") or name in _TOLD}
        assert ours <= told | {"access-control-expose-headers"}, ours - told


_TOLD = ("metadata", "retry-after", "www-authenticate")


def _matches(template: str, path: str) -> bool:
    pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(template))
    return re.fullmatch(pattern, path.partition("?")[0]) is not None
