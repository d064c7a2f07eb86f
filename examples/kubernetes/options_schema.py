"""The router's options as a JSON schema, for ``router.options`` of the chart's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, Final, get_args, get_origin, get_type_hints

from hexgen_vllm.config import PLACEMENT_NAMES, DispatchOptions
from hexgen_vllm.option import RENAMED
from hexgen_vllm.router.options import RouterOptions

_TYPES: Final = {bool: "boolean", int: "integer", float: "number", str: "string"}
Schema = dict[str, Any]
_POLICY: Final[Schema] = {
    "type": "string",
    "anyOf": [{"enum": [*PLACEMENT_NAMES, *RENAMED]}, {"pattern": r"\.py:"}],
}
"""A policy by its name, or a file of one's own."""


def router_options() -> Schema:
    """Return the schema of a mapping of the router's options, by the names of their flags."""
    return {"type": "object", "additionalProperties": False, "properties": dict(sorted(_known()))}


def _known() -> Iterator[tuple[str, Schema]]:
    for cls in (RouterOptions, DispatchOptions):
        hints = get_type_hints(cls)
        for one in fields(cls):
            if one.metadata and not one.metadata.get("hidden"):
                own = one.name == "policy"
                schema = _POLICY if own else _of(hints[one.name], one.metadata)
                for name in filter(None, (one.name, one.metadata["was"])):
                    yield name.replace("_", "-"), schema


def _of(hint: Any, meta: Mapping[str, Any]) -> Schema:
    """Return the schema of one option."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) is tuple:
        return {"type": ["string", "array"], "items": {"type": "string"}}
    if get_origin(hint) is Mapping:
        return {"type": "object", "additionalProperties": {"type": "number"}}
    bounds = {"minimum": meta["least"], "maximum": meta["most"], "enum": _words(meta)}
    found = {name: bound for name, bound in bounds.items() if bound not in (None, [])}
    return {"type": _TYPES[kinds[0] if kinds else hint], **found}


def _words(meta: Mapping[str, Any]) -> list[str]:
    """Return the words that are legal, earlier ones included; none where any text is."""
    return [*meta["choices"], *(meta["renamed"] if meta["choices"] else ())]
