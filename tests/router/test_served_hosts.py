"""By what names a router may be called that needs no key and listens on this machine only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.addresses import is_loopback
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from tests.router.http.test_server import Wire, call, request

GOOD = (
    "a", "localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:30000", "[::1]:8000", "10.1.2.3",
    "app.localhost:80", "mac.local", "host.docker.internal:30000", "router:30000", "",
)  # fmt: skip
BAD = (
    "evil.example", "evil.example:30000", "EVIL.example.", "127.0.0.1.evil.example", "rebind.it:1",
    "localhost.evil.example", "a@evil.example", "evil.example:1:2", "x.localhost.evil.example",
)  # fmt: skip


async def asked(stand: Stand, host: str, path: str = "/version") -> tuple[int, Any]:
    wire = await Wire.to(stand)
    wire.writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    status, _, body = await wire.answer()
    wire.writer.close()
    return status, json.loads(body) if body.startswith(b"{") else None


@pytest.mark.parametrize("host", GOOD)
async def test_addresses_and_local_names_may(single: Stand, host: str) -> None:
    for _ in range(2):
        assert (await asked(single, host))[0] == 200


@pytest.mark.parametrize("host", BAD)
async def test_names_that_anybody_can_register_may_not(single: Stand, host: str) -> None:
    for path in ("/version", "/metrics", "/v1/models", "/workers", "/", "/no/such"):
        status, body = await asked(single, host, path)
        assert (status, body["error"]["code"]) == (403, "host_not_allowed")


async def test_a_call_by_a_wrong_name_reaches_no_engine(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single)
    wire.writer.write(request(body).replace(b"Host: a", b"Host: evil.example"))
    assert (await wire.answer())[0] == 403
    wire.writer.write(request(body, path=f"http://evil.example{CHAT}"))
    assert (await wire.answer())[0] == 403, "the target outranks the header"
    assert not single.received()


@pytest.mark.parametrize("allowed", [("llm.example.com",), ("*.example.com",), ("*",)])
async def test_names_can_be_allowed(allowed: tuple[str, ...]) -> None:
    async with open_stand(allowed_hosts=allowed) as stand:
        assert (await asked(stand, "LLM.example.com:8000"))[0] == 200
        assert (await asked(stand, "evil.example"))[0] == (200 if allowed == ("*",) else 403)


async def test_a_router_with_keys_goes_by_any_name() -> None:
    async with open_stand(api_key=("k",)) as stand:
        assert (await asked(stand, "evil.example"))[0] == 200
        assert (await asked(stand, "evil.example", "/v1/models"))[0] == 401


async def test_a_router_for_other_machines_goes_by_any_name() -> None:
    async with open_stand(host="0.0.0.0") as stand:
        assert (await asked(stand, "evil.example"))[0] == 200


async def test_an_old_client_sends_no_name(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(b"GET /version HTTP/1.0\r\n\r\n")
    assert (await wire.answer())[0] == 200


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "")))


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "a/b", ""])
def test_allowed_hosts_are_names(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        RouterOptions(allowed_hosts=(name,))


async def test_a_router_with_keys_of_whatever_kind_takes_any_name(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("keys:\n  - {key: sk-a, tenant: a}\n")
    for keys in ({"api_key": ("sk-a",)}, {"api_keys": str(tmp_path / "keys.yaml")}):
        async with open_stand(**keys) as stand:
            assert (await asked(stand, "llm.example.com"))[0] == 200
