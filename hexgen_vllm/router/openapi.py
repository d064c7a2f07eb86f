"""The router's HTTP interface as an OpenAPI 3.1 document, made from the endpoints themselves.

Bodies and answers of calls are the engines' business: the document says what the router reads of
them, and the form of everything that the router says itself.
"""

from __future__ import annotations

import re
from typing import Any, Final

from hexgen_vllm import __version__, wire
from hexgen_vllm.router.routes import Access, Group, Route, public

_Json = dict[str, Any]

_OBJECT: Final[_Json] = {"type": "object"}
_NUMBER: Final[_Json] = {"type": "number", "exclusiveMinimum": 0}
_NAME: Final[_Json] = {"type": "string", "pattern": r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,63}$"}
HEADERS: Final[dict[str, tuple[_Json, str]]] = {
    "workflow_id": (
        {"type": "string", "pattern": r"^[\x21-\x7e]{1,128}$"},
        "The workflow that the call belongs to.",
    ),
    "workflow_type": (_NAME, "Name under which such workflows are learned."),
    "workflow_deadline_ms": (_NUMBER, "Milliseconds left for the whole workflow."),
    "stage": (_NAME, "Stage of this call."),
    "stages_left": ({"type": "integer", "minimum": 0}, "Stages after this one."),
    "expected_output_tokens": ({"type": "integer", "minimum": 1}, "Answer length, if known."),
    "workflow_final": ({"type": "boolean"}, "Nothing follows this call."),
    "tenant": (_NAME, "Who pays."),
    "service_class": (
        {"type": "string", "pattern": "^(batch|interactive)$"},
        "`batch` for a call that nobody waits for: served in what calls with deadlines leave.",
    ),
}
_ERROR: Final[_Json] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_WORKER: Final[_Json] = {
    "type": "object",
    "required": ["name", "state", "is_healthy", "kind", "models", "load"],
    "properties": {
        "name": {"type": "string"},
        "state": {"type": "string"},
        "is_healthy": {"type": "boolean"},
        "kind": {"enum": ["hexgen", "priority", "fcfs", None]},
        "models": {"type": "array", "items": {"type": "string"}},
        "load": {"type": "integer", "minimum": 0},
    },
}


def document() -> _Json:
    """Return the document."""
    paths: dict[str, _Json] = {}
    for route in public():
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "hexgen-vllm router", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR, "Worker": _WORKER},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "admin": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{"key": []}, {}],
    }


def _content(kind: str | None, schema: _Json | None = None) -> _Json:
    if kind is None:
        return {"description": "Done."}
    return {"description": "Done.", "content": {kind: {"schema": schema or {}}}}


def _operation(route: Route) -> _Json:
    failed = _content("application/json", {"$ref": "#/components/schemas/Error"})
    refused = {**failed, "description": "Not done; the error object says why."}
    done = {str(status): _done(route) for status in route.statuses}
    answers = {**done, "4XX": refused, "5XX": refused}
    if route.content is None:
        answers["503"] = {"description": "Not ready."}
    operation: _Json = {"tags": [route.group.value], "summary": route.summary, "responses": answers}
    parameters = _parameters(route)
    if parameters:
        operation["parameters"] = parameters
    body = _body(route)
    if body is not None:
        content = {"application/json": {"schema": body}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.access is Access.ADMIN:
        operation["security"] = [{"admin": []}]
    return operation


def _done(route: Route) -> _Json:
    if route.endpoint is not None:
        content: _Json = {"application/json": {}, "text/event-stream": {}}
        return {"description": "The engine's answer, byte for byte.", "content": content}
    if route.group is Group.ADMIN:
        listed = route.method == "GET"
        schema = _OBJECT if listed else {"$ref": "#/components/schemas/Worker"}
        return _content(route.content, schema)
    return _content(route.content)


def _parameters(route: Route) -> list[_Json]:
    given: list[_Json] = [
        {"in": "path", "name": name, "required": True, "schema": _NAME}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    for name in route.query:
        must = {"required": True} if name.endswith("*") else {}
        schema = {"type": "string"}
        given.append({"in": "query", "name": name.rstrip("*"), **must, "schema": schema})
    if route.endpoint is not None:
        given += (
            {"in": "header", "name": wire.header_name(name), "description": text, "schema": schema}
            for name, (schema, text) in HEADERS.items()
        )
    return given


def _body(route: Route) -> _Json | None:
    """Return the schema of the body, ``None`` if it has none."""
    if route.path == "/workers" and route.method == "POST":
        properties = {name: {"type": "string"} for name in ("url", "name", "model")}
        return {"type": "object", "required": ["url"], "properties": properties}
    if route.group is not Group.CALLS or route.query:
        return None
    known: _Json = {"model": {"type": "string"}}
    if route.endpoint is not None:
        known["stream"] = {"type": "boolean"}
        for name in route.endpoint.limit_fields:
            known[name] = {"type": "integer", "minimum": 1}
    return {"type": "object", "properties": known}
