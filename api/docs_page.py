"""`GET /docs`: the description for people, one page of HTML without scripts, fonts or anything else from elsewhere.

The bundles of Swagger UI and Redoc load from a network, or weigh megabytes; this API has few paths, and a page that is
printed from the description shows them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

JsonObject = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --link: #06c; --get: #197a3e; --post: #a15c00 }
@media (prefers-color-scheme: dark) { :root { --link: #6af; --get: #5c9; --post: #eb5 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem 1.25rem 4rem }
h1 { margin-bottom: 0 } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line) } h4 { margin: 1.25rem 0 .25rem }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
code, pre { font: .875em/1.45 ui-monospace, monospace } code { background: var(--soft); padding: .1em .3em }
pre { background: var(--soft); padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere }
pre code { background: none; padding: 0 }
table + table { margin-top: 1.5rem }
table { border-collapse: collapse; width: 100%; font-size: .9375em; display: block; overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line) }
section { margin: 2rem 0; padding-left: 1rem; border-left: 3px solid var(--line) } section h3 { margin: 0 }
.method { font: 700 .8em ui-monospace, monospace; text-transform: uppercase; margin-right: .5em }
.get { color: var(--get) } .post { color: var(--post) } .soft { opacity: .75 } nav li { list-style: none }
"""
_UNTOLD = "any"
_SHORT = 4
"""Forms of a value that are told in full."""


def page(document: JsonObject, address: str) -> str:
    """The whole page.

    Args:
        document: OpenAPI 3.1, as `openapi.document` makes it.
        address: where the server is, for the lines to copy.
    """
    info, schemas = document["info"], document["components"]["schemas"]
    operations = [
        (method, path, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    tags = list(dict.fromkeys(operation["tags"][0] for _, _, operation in operations))
    title = f"{info['title']} {info['version']}"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f'<p>{_marked(info["summary"])} For machines: <a href="openapi.json">openapi.json</a>.</p>',
        "<p>To run the examples on this page, first set:</p>",
        f"<pre><code>URL={escape(address)}{_key_line(operations)}</code></pre>",
        "<nav><ul>",
        *(
            f'<li><a href="#{operation["operationId"]}">{_head(method, path)}</a> '
            f'<span class="soft">{escape(operation["summary"])}</span></li>'
            for method, path, operation in operations
        ),
        "</ul></nav>",
    ]
    for tag in tags:
        parts.append(f"<h2>{escape(tag.capitalize())}</h2>")
        for method, path, operation in operations:
            if operation["tags"][0] == tag:
                parts.extend(_operation(method, path, operation))
    parts.append('<h2 id="errors">Errors</h2><p>All have this body; <code>code</code> is the status.</p>')
    parts.append(_rows(("status", "type", "headers"), _errors(document["components"]["responses"])))
    parts.append(_rows(("header", "meaning"), _headers(document["components"]["headers"])))
    parts.append("<h2>Bodies</h2>")
    for name, schema in schemas.items():
        if not name.startswith("Error") or name in ("ErrorBody", "ErrorFields"):
            parts.extend(_schema(name, schema))
    return "".join([*parts, "</body></html>"])


def _key_line(operations: Iterable[tuple[str, str, JsonObject]]) -> str:
    return "\nKEY=your-key" if any("security" in operation for _, _, operation in operations) else ""


def _operation(method: str, path: str, operation: JsonObject) -> Iterator[str]:
    yield f'<section id="{operation["operationId"]}"><h3>{_head(method, path)}</h3>'
    yield f"<p><strong>{escape(operation['summary'])}.</strong> {_marked(operation['description'])}</p>"
    if "security" in operation:
        yield "<p>Needs a key: <code>Authorization: Bearer &lt;key&gt;</code>.</p>"
    if operation["parameters"]:
        yield "<h4>Headers and path</h4>"
        yield _rows(
            ("name", "type", "meaning"),
            (
                (_code(each["name"]), _type(each["schema"]), _marked(each["description"]))
                for each in operation["parameters"]
            ),
        )
    for media_type, content in operation.get("requestBody", {"content": {}})["content"].items():
        yield f"<h4>Body</h4><p>{_code(media_type)}: {_type(content['schema'])}</p>"
        for name, example in content["examples"].items():
            line = _curl(path, example["value"], operation)
            yield f"<p>{escape(name.capitalize())}:</p><pre><code>{line}</code></pre>"
    yield "<h4>Answers</h4>"
    yield _rows(("status", "body", "headers"), _answers(operation["responses"]))
    for content in operation["responses"]["200"]["content"].values():
        if "example" in content:
            yield f"<pre><code>{escape(json.dumps(content['example']), quote=False)}</code></pre>"
    yield "</section>"


def _curl(path: str, body: Any, operation: JsonObject) -> str:
    """A line for the shell."""
    key = ' -H "Authorization: Bearer $KEY"' if "security" in operation else ""
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    file = " -o vectors.bin" if str(body.get("encoding_format")).startswith("bytes") else ""  # not for a terminal
    return escape(f"curl \"$URL{path}\"{key} -H 'Content-Type: application/json' -d '{quoted}'{file}", quote=False)


def _answers(responses: JsonObject) -> Iterator[tuple[str, str, str]]:
    for status, response in responses.items():
        if "$ref" not in response:
            forms = (
                _code(media_type) + (f": {_type(content['schema'])}" if "schema" in content else "")
                for media_type, content in response["content"].items()
            )
            headers = ", ".join(map(_code, response["headers"]))
            yield _code(status), f"{_marked(response['description'])} {' or '.join(forms)}", headers
    errors = [status for status, response in responses.items() if "$ref" in response]
    yield ", ".join(map(_code, errors)), _link("ErrorBody"), '<a href="#errors">those of errors</a>'


def _errors(responses: JsonObject) -> Iterator[tuple[str, str, str]]:
    for name, response in responses.items():
        headers = ", ".join(map(_code, response["headers"]))
        yield _code(name.removeprefix("Error")), _marked(response["description"]), headers


def _headers(headers: JsonObject) -> Iterator[tuple[str, str]]:
    for name, header in headers.items():
        yield _code(name), _marked(header["description"])


def _schema(name: str, schema: JsonObject) -> Iterator[str]:
    yield f'<section id="{name}"><h3>{escape(name)}</h3><p>{_marked(schema["description"])}</p>'
    required = schema.get("required", ())
    yield _rows(
        ("field", "type", "default", "meaning"),
        (
            (
                _code(field) + (" *" if field in required else ""),
                _type(described),
                _code(json.dumps(described["default"])) if "default" in described else "",
                _marked(described["description"]),
            )
            for field, described in schema["properties"].items()
        ),
    )
    yield "</section>"


def _type(schema: JsonObject) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return _code(json.dumps(schema["const"]))
    if "enum" in schema:
        return ", ".join(_code(json.dumps(value)) for value in schema["enum"])
    if "anyOf" in schema:
        forms = list(dict.fromkeys(map(_type, schema["anyOf"])))
        return " or ".join(forms[:_SHORT]) + (" or …" if len(forms) > _SHORT else "")
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    bounds = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    return " ".join([escape(str(schema.get("type", _UNTOLD))), *bounds])


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; the cells are HTML already."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _head(method: str, path: str) -> str:
    return f'<span class="method {method}">{method}</span><code>{escape(path)}</code>'


def _link(name: str) -> str:
    return f'<a href="#{escape(name)}">{escape(name)}</a>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _marked(text: str) -> str:
    """Text in which backticks mark code."""
    pieces = escape(text, quote=False).split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))
