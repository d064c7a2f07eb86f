"""One table says what is served: to whom, where, and what is nearly right."""

from __future__ import annotations

import re

import pytest

from hexgen_vllm.ports import free_ports
from hexgen_vllm.router.route import Access, Route, Topic
from hexgen_vllm.router.routes import ROUTES, public
from hexgen_vllm.testing.stand import Stand, open_stand


def address(route: Route) -> str:
    return re.sub(r"\{\w+\}", "engine-0", route.path)


async def test_the_metrics_port_serves_all_of_monitoring_and_nothing_else() -> None:
    (port,) = free_ports("127.0.0.1", 1)
    async with open_stand(prometheus_port=port, api_key=("k",)) as stand:
        paths: dict[str, set[Topic]] = {}
        for route in public():
            paths.setdefault(address(route), set()).add(route.topic)
        assert {"/ping", "/version", "/metrics", "/health/readiness"} <= paths.keys()
        for path, groups in paths.items():
            async with stand.client.get(f"http://127.0.0.1:{port}{path}") as answer:
                assert answer.status == (200 if Topic.MONITORING in groups else 404), path
        assert stand.received() == []


async def test_every_route_asks_for_the_key_that_the_table_says() -> None:
    async with open_stand(api_key=("k",), admin_api_key=("a",)) as stand:
        for route in public():
            url = stand.router.url + address(route)
            async with stand.client.request(route.method, url, allow_redirects=False) as answer:
                assert (answer.status == 401) == (route.access is not Access.OPEN), route.path
            if route.access is Access.ADMIN:
                headers = {"Authorization": "Bearer k"}
                async with stand.client.request(route.method, url, headers=headers) as answer:
                    assert answer.status == 401, route.path


async def test_other_methods_are_405_with_those_that_are_allowed(stand: Stand) -> None:
    allowed: dict[str, set[str]] = {}
    for route in public():
        allowed.setdefault(address(route), set()).update(route.methods)
    for path, methods in allowed.items():
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - methods:
            async with stand.client.request(method, stand.router.url + path) as answer:
                assert answer.status == 405, (method, path)
                assert answer.headers["Allow"] == ", ".join(sorted(methods))
                if method != "HEAD":
                    assert "error" in await answer.json()


@pytest.mark.parametrize("query", ["", "?a=b/&c="])
async def test_a_slash_too_many_leads_to_the_path_as_in_vllm(stand: Stand, query: str) -> None:
    for route in public():
        if route.path == "/":
            continue
        url = f"{stand.router.url}{address(route)}/{query}"
        async with stand.client.request(route.method, url, allow_redirects=False) as answer:
            assert answer.status == 307, route.path
            assert answer.headers["Location"] == address(route) + query
    body = stand.body()
    async with stand.client.post(
        f"{stand.router.url}/v1/chat/completions/{query}", json=body
    ) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "path", ["//evil.example/", "//v1/models/", "/v1/models//", "/\\evil.example/"]
)
async def test_nobody_is_led_elsewhere(stand: Stand, path: str) -> None:
    async with stand.client.get(stand.router.url + path, allow_redirects=False) as answer:
        assert "Location" not in answer.headers


@pytest.mark.parametrize("path", [r.path for r in ROUTES if r.access is Access.PROCESS])
async def test_what_processes_say_to_each_other_is_not_there_for_others(
    stand: Stand, path: str
) -> None:
    for method in ("GET", "POST"):
        async with stand.client.request(method, stand.router.url + path) as answer:
            assert answer.status in (403, 404)
            assert "Allow" not in answer.headers
