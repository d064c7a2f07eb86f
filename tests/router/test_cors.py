"""Web pages of allowed origins may call the router; others may not read its answers."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen_vllm.testing.fake_server import Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand

EXPOSED = "Retry-After, X-Request-ID, x-hexgen-engine, x-llm-d-request-dropped-reason"
HERE, THERE = "https://app.example", "https://evil.example"


async def preflight(stand: Stand, origin: str) -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-hexgen-stage",
    }
    async with stand.client.options(stand.router.url + CHAT, headers=headers) as answer:
        return answer


async def test_an_allowed_page_may_ask_and_read() -> None:
    async with open_stand(allowed_origins=(HERE,), api_key=("k",), allow_credentials=True) as stand:
        answer = await preflight(stand, HERE)
        assert answer.status == 204
        said = {k.lower(): v for k, v in answer.headers.items() if k.startswith("Access-Control")}
        assert said == {
            "access-control-allow-origin": HERE,
            "access-control-allow-methods": "DELETE, GET, HEAD, OPTIONS, POST",
            "access-control-allow-headers": "authorization, x-hexgen-stage",
            "access-control-allow-credentials": "true",
            "access-control-expose-headers": EXPOSED,
            "access-control-max-age": "600",
        }
        stand.engines[0].faults.append(Fault("status", status=400))
        for key, stream, status in (("k", False, 400), ("k", True, 200), ("x", False, 401)):
            headers = {"Origin": HERE, "Authorization": f"Bearer {key}"}
            async with stand.post(headers=headers, stream=stream) as answer:
                assert answer.status == status
                assert answer.headers["Access-Control-Allow-Origin"] == HERE
                assert answer.headers["Vary"] == "Origin"
                await answer.read()


async def test_other_pages_may_not_read() -> None:
    async with open_stand(allowed_origins=(HERE,)) as stand:
        assert "Access-Control-Allow-Origin" not in (await preflight(stand, THERE)).headers
        async with stand.post(headers={"Origin": THERE}) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_all_pages_may_be_allowed() -> None:
    async with (
        open_stand(allowed_origins=("*",)) as stand,
        stand.post(headers={"Origin": THERE}) as answer,
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Vary" not in answer.headers


@pytest.mark.parametrize("origin", [HERE, THERE])
async def test_without_the_option_nothing_is_said(stand: Stand, origin: str) -> None:
    assert (await preflight(stand, origin)).status == 405
    async with stand.post(headers={"Origin": origin}) as answer:
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
