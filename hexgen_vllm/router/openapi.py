"""The router's HTTP interface as an OpenAPI 3.1 document, made from the endpoints themselves.

Bodies and answers of calls are the engines' business: the document says what the router reads of
them, and the form of everything that the router says itself.
"""

from __future__ import annotations

from typing import Any, Final

from hexgen_vllm import __version__, wire
from hexgen_vllm.router.endpoints import ENDPOINTS, Endpoint

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
# Path -> what it says, content type of its answer.
_PLAIN: Final = {
    "/health": ("Whether a call that comes now would be served: 200 or 503.", None),
    "/readiness": ("The same as /health.", None),
    "/health/readiness": ("The same as /health.", None),
    "/liveness": ("Whether the process runs.", None),
    "/health/liveness": ("The same as /liveness.", None),
    "/ping": ("The same as /liveness.", None),
    "/v1/models": ("The models of all engines.", "application/json"),
    "/version": ("Version of the router.", "application/json"),
    "/workers": ("The engines.", "application/json"),
    "/load": ("Number of open calls.", "application/json"),
    "/metrics": ("Metrics in Prometheus' text format.", "text/plain"),
    "/scheduling/diagnostics": ("What decisions stand on, and the last ones.", "application/json"),
    "/tuning": ("What tuning did and suggests.", "application/json"),
    "/tuning/recent": ("Recent workflows, one JSON object a line.", "application/x-ndjson"),
    "/tuning/fleet": ("The measured engines, as a fleet file.", "application/yaml"),
    "/ui": ("A page that shows the router live.", "text/html"),
    "/ui/data": ("What the page shows.", "application/json"),
    "/openapi.json": ("This document.", "application/json"),
}
_PASSED_ON: Final = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
# Method, path, what it does, query parameter, successful statuses.
_ADMIN: Final = (
    ("post", "/workers", "Take in an engine.", None, ("201",)),
    ("post", "/workers/{name}/drain", "Give an engine no new calls.", None, ("200",)),
    ("post", "/workers/{name}/undrain", "Give an engine calls again.", None, ("200",)),
    ("delete", "/workers/{name}", "Drain an engine and forget it.", "force", ("200", "202")),
    ("post", "/add_worker", "Take in an engine.", "url", ("200",)),
    ("post", "/remove_worker", "Drain an engine and forget it.", "url", ("200", "202")),
    ("get", "/list_workers", "Addresses of the engines.", None, ("200",)),
)


def document() -> _Json:
    """Return the document."""
    paths: dict[str, _Json] = {}
    for path, (text, kind) in _PLAIN.items():
        paths[path] = {"get": _operation("status", text, {"200": _content(kind)})}
    paths["/"] = {"get": _operation("status", "Leads to /ui.", {"302": {"description": "There."}})}
    for endpoint in ENDPOINTS:
        paths[endpoint.path] = {"post": _call(endpoint)}
    for path in _PASSED_ON:
        paths[path] = {"post": _passed_on()}
    paths["/finish_session"] = {"post": _finish()}
    for method, path, text, query, statuses in _ADMIN:
        paths.setdefault(path, {})[method] = _admin(path, text, query, statuses)
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


def _operation(tag: str, text: str, done: _Json, **more: Any) -> _Json:
    failed = _content("application/json", {"$ref": "#/components/schemas/Error"})
    refused = {**failed, "description": "Not done; the error object says why."}
    answers = {**done, "4XX": refused, "5XX": refused}
    if tag == "status" and "content" not in next(iter(done.values())):
        answers["503"] = {"description": "Not ready."}
    return {"tags": [tag], "summary": text, "responses": answers, **more}


def _call(endpoint: Endpoint) -> _Json:
    properties: _Json = {"model": {"type": "string"}, "stream": {"type": "boolean"}}
    properties |= {name: {"type": "integer", "minimum": 1} for name in endpoint.limit_fields}
    body = {"type": "object", "properties": properties}
    done = {
        "description": "The engine's answer, byte for byte.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
    headers = [
        {"in": "header", "name": wire.header_name(name), "description": text, "schema": schema}
        for name, (schema, text) in HEADERS.items()
    ]
    return _operation(
        "calls",
        "A call, placed on an engine.",
        {"200": done},
        parameters=headers,
        requestBody={"required": True, "content": {"application/json": {"schema": body}}},
    )


def _passed_on() -> _Json:
    body = {"type": "object", "properties": {"model": {"type": "string"}}}
    return _operation(
        "calls",
        "Passed on to an engine that has the model.",
        {"200": _content("application/json")},
        requestBody={"required": True, "content": {"application/json": {"schema": body}}},
    )


def _finish() -> _Json:
    query = {"in": "query", "name": "session_id", "required": True, "schema": {"type": "string"}}
    text = "End a workflow."
    return _operation("calls", text, {"200": _content("application/json")}, parameters=[query])


def _admin(path: str, text: str, query: str | None, statuses: tuple[str, ...]) -> _Json:
    schema = _OBJECT if path == "/list_workers" else {"$ref": "#/components/schemas/Worker"}
    done = {status: _content("application/json", schema) for status in statuses}
    given: list[_Json] = []
    if "{name}" in path:
        given.append({"in": "path", "name": "name", "required": True, "schema": _NAME})
    if query is not None:
        given.append({"in": "query", "name": query, "schema": {"type": "string"}})
    more: _Json = {"parameters": given} if given else {}
    if path == "/workers":
        properties = {name: {"type": "string"} for name in ("url", "name", "model")}
        body = {"type": "object", "required": ["url"], "properties": properties}
        more["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return _operation("admin", text, done, security=[{"admin": []}], **more)
