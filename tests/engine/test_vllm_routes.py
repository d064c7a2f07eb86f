"""vLLM's own routes, as installed: those that manage an engine are closed, all others pass."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import vllm.entrypoints
from fastapi import APIRouter
from fastapi.routing import APIRoute

from hexgen_vllm.router.routes import manages

pytestmark = pytest.mark.engine

# Packages of vLLM whose routes are for who runs an engine; what an engine says of itself is the
# router's own to say.
MANAGING = (".serve.dev.", ".rl.", ".serve.elastic_ep.", ".serve.profile.", ".fault_tolerance.")
OWN = {"/health", "/load", "/version", "/metrics", "/ping", "/v1/models"}


def routers() -> Iterator[tuple[str, APIRoute]]:
    for found in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if not found.name.endswith((".api_router", ".basic", ".health")):
            continue
        try:
            module = importlib.import_module(found.name)
        except ImportError:
            continue  # of an extra that is not installed
        for value in vars(module).values():
            if isinstance(value, APIRouter):
                yield from ((found.name, r) for r in value.routes if isinstance(r, APIRoute))


ROUTES = sorted({(module, route.path) for module, route in routers()})


@pytest.mark.parametrize(("module", "path"), ROUTES, ids=[path for _, path in ROUTES])
def test_what_manages_an_engine_is_known(module: str, path: str) -> None:
    if any(part in f"{module}." for part in MANAGING):
        assert manages(path)
    elif path not in OWN and "abort" not in path and path != "/kv_event_sources":
        assert not manages(path)


def test_there_are_routes() -> None:
    paths = {path for _, path in ROUTES}
    assert {"/collective_rpc", "/sleep", "/rerank", "/v1/chat/completions"} <= paths
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/abort_requests"):
        assert manages(path)
