"""The OpenAPI document names every endpoint and no other, and answers are what it says."""

from __future__ import annotations

import re
from typing import Any

from hexgen_vllm import wire
from hexgen_vllm.router.routes import public
from hexgen_vllm.router.status import pages
from hexgen_vllm.testing.stand import Stand, open_stand


def test_every_route_is_there() -> None:
    paths = pages.openapi_document(public())["paths"]
    written = {(method.upper(), path) for path, of in paths.items() for method in of}
    assert written == {(route.method, route.path) for route in public()}


async def test_the_document_is_served(stand: Stand) -> None:
    async with stand.get("/openapi.json") as answer:
        assert await answer.json() == pages.openapi_document(public())


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*(references(v) for v in value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_references_lead_somewhere() -> None:
    written = pages.openapi_document(public())
    for name in references(written):
        found: Any = written
        for part in name.removeprefix("#/").split("/"):
            found = found[part]
        assert found["type"] == "object"


def test_every_header_of_ours_is_there() -> None:
    """But for those that only the router sends."""
    post = pages.openapi_document(public())["paths"]["/v1/chat/completions"]["post"]
    named = {parameter["name"] for parameter in post["parameters"]}
    assert named == {wire.header_name(f) for f in wire.FIELDS} - {
        "x-hexgen-tail-ms", "x-hexgen-background",
    }  # fmt: skip
    pattern = next(p["schema"]["pattern"] for p in post["parameters"] if p["name"].endswith("-id"))
    assert re.fullmatch(pattern, "w" * 128)
    assert not re.fullmatch(pattern, "a b")


async def test_errors_have_the_form_that_is_written() -> None:
    form = pages.openapi_document(public())["components"]["schemas"]["Error"]["properties"]["error"]
    async with open_stand(api_key=("k",)) as stand:
        for path in ("/workers", "/nope", "/v1/chat/completions"):
            async with stand.get(path) as answer:
                error = (await answer.json())["error"]
                assert list(error) == form["required"]
