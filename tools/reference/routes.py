"""HTTP endpoints: the router's from its OpenAPI document, the engine's from its middleware."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.router import words
from hexgen_vllm.router.routes import public
from hexgen_vllm.router.status import pages
from tools.reference.markdown import code, table

_ENGINE: Final = (
    ("GET", "/hexgen/stats", "The scheduler's telemetry, one JSON object."),
    ("GET", "/metrics", "vLLM's metrics and, after them, `hexgen_vllm_*`."),
)


def sections() -> Iterator[tuple[str, str]]:
    """Yield title and text: the router, what a call may say, the engine."""
    document = pages.openapi_document(public())
    rows = [
        (
            code(method.upper()),
            code(path),
            _key(operation),
            operation["summary"],
            _parameters(operation),
        )
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    told = "`GET /openapi.json` has the same with forms of bodies and answers."
    yield (
        "Router",
        f"{told}\n\n{table(('method', 'path', 'key', 'what', 'parameters'), rows)}",
    )
    yield "Headers of a call", _headers()
    yield "Words of other projects", _words()
    yield (
        "Engine",
        "Beside those of `vllm serve`.\n\n"
        + table(("method", "path", "what"), [(code(m), code(p), text) for m, p, text in _ENGINE]),
    )


def _key(operation: dict[str, Any]) -> str:
    return "admin" if "admin" in operation["tags"] else ""


def _parameters(operation: dict[str, Any]) -> str:
    found = [p for p in operation.get("parameters", ()) if p["in"] == "query"]
    return ", ".join(code(one["name"]) for one in found)


def _headers() -> str:
    rows = [
        (code(wire.header_name(name)), code(wire.xarg_name(name)), _form(schema), text)
        for name, (schema, text) in pages.HEADERS.items()
    ]
    return table(("header", "`vllm_xargs` key", "form", "meaning"), rows)


def _words() -> str:
    read = [
        (word.meaning.value, word.place.value, code(word.name), word.form.text, word.of)
        for word in words.WORDS
    ]
    left = [(code(name), why) for name, why in words.LEFT.items()]
    return (
        "Read where none of our own names says the same. Of the words with one meaning the first "
        "of this table that can be read counts, but of timeouts the shortest; a deadline goes "
        "before both. What cannot be read was not said. "
        "[What becomes of it](other-stacks.md#words-that-others-say).\n\n"
        + table(("meaning", "where", "word", "value", "of"), read)
        + "\n\nNot read, on purpose:\n\n"
        + table(("word", "why"), left)
    )


def _form(schema: dict[str, Any]) -> str:
    if "pattern" in schema:
        return code(schema["pattern"])
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    if least is None:
        return str(schema["type"])
    return f"{schema['type']}, {'≥' if 'minimum' in schema else '>'} {least}"
