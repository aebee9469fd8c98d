"""The OpenAPI document, made from the same table that makes the routes, so that neither can say what is not so."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.admission import Caller, Role
from router.errors import ErrorBody

Handler = Callable[[Request, Caller], Awaitable[Response]]
_PATH_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_REF: Final = "#/components/schemas/{name}"

REASONS: Final = {
    200: "Done",
    201: "Recorded, durably",
    202: "Queued",
    400: "Not valid, or not supported; `param` names the field",
    401: "No valid key, or a forged pair token",
    403: "Not allowed, or no consent",
    404: "Not there",
    408: "The body did not arrive in time",
    409: "Contradicts what is recorded",
    410: "Too late",
    413: "Too large",
    429: "Too many at once for this key; see Retry-After",
    502: "The replica failed before the first token",
    503: "Not now; see Retry-After",
    504: "Past the deadline",
}


class Header(msgspec.Struct, frozen=True):
    name: str
    description: str


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One route: how it is called, who may call it, what it takes and gives."""

    method: str
    path: str  # in Starlette's words: {name} or {name:path}
    handler: Handler
    summary: str
    role: Role | None = None  # None: anyone
    body: type[Any] | None = None
    is_body_required: bool = True
    patterns: Mapping[str, str] = {}  # of path parameters
    answers: Mapping[int, type[Any] | None] = {}
    errors: Sequence[int] = ()
    media_type: str = "application/json"
    streams: type[Any] | None = None  # the data of each server-sent event, when asked for
    headers_in: Sequence[Header] = ()
    headers_out: Sequence[Header] = ()


def document(endpoints: Sequence[Endpoint], *, title: str, version: str) -> dict[str, Any]:
    """OpenAPI 3.2, the first that can describe event streams, for ``endpoints``."""
    types = {t for e in endpoints for t in (e.body, e.streams, *e.answers.values()) if t is not None} | {ErrorBody}
    ordered = sorted(types, key=lambda cls: cls.__name__)
    refs, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    schema_of = dict(zip(ordered, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = _PATH_PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, schema_of)
    key = {"type": "http", "scheme": "bearer", "description": "Needed where the deployment has a key file."}
    return {
        "openapi": "3.2.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": key}},
    }


def _operation(endpoint: Endpoint, schema_of: Mapping[type[Any], Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{re.sub(r'[^a-z0-9]+', '_', endpoint.path.lower())}".rstrip("_"),
        "parameters": _parameters(endpoint),
        "responses": {str(status): _answer(endpoint, status, schema_of) for status in endpoint.answers},
        "security": [{"key": [endpoint.role]}, {}] if endpoint.role else [],
    }
    if endpoint.body is not None:
        content = {"application/json": {"schema": schema_of[endpoint.body]}}
        operation["requestBody"] = {"required": endpoint.is_body_required, "content": content}
    errors = {403, *endpoint.errors, *((401,) if endpoint.role else ()), *((400, 408, 413) if endpoint.body else ())}
    for status in sorted(errors):
        content = {"application/json": {"schema": schema_of[ErrorBody]}}
        operation["responses"][str(status)] = {"description": REASONS[status], "content": content}
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    names = _PATH_PARAMETER.findall(endpoint.path)
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": _text(endpoint.patterns.get(name))} for name in names
    ]
    in_header = [
        {"name": h.name, "in": "header", "required": False, "description": h.description, "schema": {"type": "string"}}
        for h in endpoint.headers_in
    ]
    return in_path + in_header


def _answer(endpoint: Endpoint, status: int, schema_of: Mapping[type[Any], Any]) -> dict[str, Any]:
    cls = endpoint.answers[status]
    schema = schema_of[cls] if cls is not None else {"type": "string"}
    content: dict[str, Any] = {endpoint.media_type: {"schema": schema}}
    if endpoint.streams is not None:
        content["text/event-stream"] = {"itemSchema": _event(schema_of[endpoint.streams], schema_of[ErrorBody])}
    answer: dict[str, Any] = {"description": REASONS.get(status, "Answer"), "content": content}
    if endpoint.headers_out:
        schema_text = {"type": "string"}
        answer["headers"] = {
            h.name: {"description": h.description, "schema": schema_text} for h in endpoint.headers_out
        }
    return answer


def _text(pattern: str | None) -> dict[str, str]:
    return {"type": "string"} if pattern is None else {"type": "string", "pattern": pattern}


def _event(*records: Any) -> dict[str, Any]:
    """One server-sent event: its data is one of ``records`` as JSON, or the word that ends the stream."""
    record = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": list(records)}}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, record]}}}
