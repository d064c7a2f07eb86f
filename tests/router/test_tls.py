"""HTTPS towards clients and engines, with certificates made for the test."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import aiohttp
import pytest
import trustme

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router import access
from hexgen_vllm.router.http import server as http_server
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.manual_clock import ManualClock
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from hexgen_vllm.types import EngineState
from tests.router.http.test_server import call, request


class Authority(NamedTuple):
    """A certificate authority and what it signed, as files."""

    ca: trustme.CA
    ca_certs: str
    certfile: str
    keyfile: str

    def flags(self, **more: str) -> dict[str, str]:
        """Return the router's options."""
        return {"ssl_certfile": self.certfile, "ssl_keyfile": self.keyfile, **more}

    def trusting(self) -> ssl.SSLContext:
        """Return what a client checks with that trusts this authority alone."""
        return ssl.create_default_context(cafile=self.ca_certs)


def authority(folder: Path) -> Authority:
    folder.mkdir()
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1", "localhost")
    names = [str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")]
    ca.cert_pem.write_to_path(names[0])
    leaf.cert_chain_pems[0].write_to_path(names[1])
    leaf.private_key_pem.write_to_path(names[2])
    return Authority(ca, *names)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return authority(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return authority(tmp_path / "theirs")


async def asked(stand: Stand, context: ssl.SSLContext) -> int:
    url = stand.router.url + CHAT
    async with stand.client.post(url, json=stand.body(stream=True), ssl=context) as answer:
        assert (await answer.text()).endswith("data: [DONE]\n\n")
        return int(answer.status)


async def test_clients_are_served_over_https(ours: Authority, theirs: Authority) -> None:
    async with open_stand(**ours.flags()) as stand:
        assert stand.router.url.startswith("https://")
        assert await asked(stand, ours.trusting()) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await asked(stand, theirs.trusting())
        with pytest.raises(aiohttp.ClientError):
            await stand.client.get(stand.router.url.replace("https", "http") + "/version")
        assert await asked(stand, ours.trusting()) == 200, "a bad handshake harms nobody else"


async def test_clients_may_have_to_show_a_certificate(ours: Authority, theirs: Authority) -> None:
    async with open_stand(**ours.flags(ssl_ca_certs=theirs.ca_certs)) as stand:
        nameless, known, stranger = (ours.trusting() for _ in range(3))
        theirs.ca.issue_cert("client.example").configure_cert(known)
        ours.ca.issue_cert("client.example").configure_cert(stranger)
        assert await asked(stand, known) == 200
        for context in (nameless, stranger):
            with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
                await asked(stand, context)


@asynccontextmanager
async def https_engine(signed_by: Authority, **options: Any) -> AsyncIterator[Stand]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(signed_by.certfile, signed_by.keyfile)
    async with (
        FakeServer(tls=context) as engine,
        open_stand(worker_urls=(engine.url,), wait=False, **options) as stand,
    ):
        stand.engines[:] = [engine]
        yield stand


async def test_engines_may_speak_https(ours: Authority) -> None:
    async with https_engine(
        ours, engine_ssl_ca_certs=ours.ca_certs, engine_api_key="inner"
    ) as stand:
        await stand.all_ready()
        async with stand.post() as answer:
            assert answer.status == 200
        assert stand.received()[0].headers["Authorization"] == "Bearer inner"


@pytest.mark.parametrize("known", [True, False])
async def test_an_engine_that_nobody_vouches_for_is_not_spoken_to(
    ours: Authority, theirs: Authority, known: bool
) -> None:
    trusted = (ours if known else theirs).ca_certs
    options = {"engine_ssl_ca_certs": trusted, "allow_unauthenticated_admin": True}
    async with https_engine(ours, **options) as stand:
        url, name = stand.engines[0].url.replace("127.0.0.1", "localhost"), "by-name"
        body = {"url": url, "name": name}
        async with stand.client.post(stand.router.url + "/workers", json=body) as answer:
            assert answer.status == (201 if known else 400)
            assert ("error" in await answer.json()) == (not known)
        assert (name in stand.context.fleet.engines) == known


def test_files_that_do_not_fit_are_one_sentence(ours: Authority, theirs: Authority) -> None:
    nonsense = Path(ours.certfile).with_name("nonsense")
    nonsense.write_text("nonsense")
    options = [
        RouterOptions(ssl_certfile=ours.certfile, ssl_keyfile=theirs.keyfile),
        RouterOptions(ssl_certfile=str(nonsense)),
        RouterOptions(**ours.flags(ssl_ca_certs=str(nonsense))),  # type: ignore[arg-type]
    ]
    for one in options:
        with pytest.raises(ConfigError, match=r"^ssl_certfile, .* cannot be used: .*\.$"):
            access.for_clients(one)
    with pytest.raises(ConfigError, match=r"^engine_ssl_ca_certs cannot be used: .*\.$"):
        access.for_engines(RouterOptions(engine_ssl_ca_certs=str(nonsense)))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ssl_keyfile": __file__}, "ssl_certfile"),
        ({"ssl_ca_certs": __file__}, "ssl_certfile"),
        ({"ssl_certfile": "/nowhere"}, "ssl_certfile"),
        ({"engine_ssl_ca_certs": "/nowhere"}, "engine_ssl_ca_certs"),
        ({"allow_credentials": True, "allowed_origins": ("*",)}, "allowed_origins"),
        ({"api_key": ("",)}, "api_key"),
        ({"worker_allowed_hosts": ("http://x",)}, "worker_allowed_hosts"),
    ],
)
def test_access_options_must_fit_together(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=f"^{word}"):
        RouterOptions(**options)


async def test_a_client_that_does_not_read_over_https_takes_no_engine_out(ours: Authority) -> None:
    """What waits for it stands in the buffers of TLS, above those of the connection."""
    clock = ManualClock()
    fakes = (FakeSettings(), FakeSettings())
    async with open_stand(*fakes, clock=clock, engine_stall_secs=10.0, **ours.flags()) as stand:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", stand.router.port, ssl=ours.trusting(), limit=2**12
        )
        cast(asyncio.ReadTransport, writer.transport).pause_reading()
        body = call(stand, stream=True, max_tokens=10**6, ignore_eos=True)
        writer.write(request(body))
        await stand.until(lambda: stand.context.guard.attempts)
        (attempt,) = stand.context.guard.attempts
        await stand.until(attempt.client_is_slow)
        progress = -1
        while progress != attempt.progress:  # until no buffer takes any more
            progress = attempt.progress
            await asyncio.sleep(0.1)
        for _ in range(40):
            clock.advance(10.0)
            stand.context.tick()
            assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2
            await asyncio.sleep(0)
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert stand.context.ledger.failed() == {"rejected-context-cancelled": 1}
        writer.transport.abort()


async def test_connections_that_say_nothing_keep_nobody_out(ours: Authority) -> None:
    """Before it is encrypted, a connection counts like any other, and the oldest gives way."""
    async with open_stand(**ours.flags(), max_connections=5) as stand:
        server: Any = stand.router._runner.server  # type: ignore[union-attr]
        silent = [await asyncio.open_connection("127.0.0.1", stand.router.port) for _ in range(60)]
        await stand.until(lambda: server.refused >= 39)
        assert len(server._greeting) <= 5 + 16
        trusting = ours.trusting()
        for _ in range(8):
            assert await asked(stand, trusting) == 200
        gone = [reader for reader, _ in silent if reader.at_eof() or reader.exception()]
        assert len(gone) >= 39
        for _, writer in silent:
            writer.close()
        await stand.until(lambda: not server._greeting)
        stand.assert_settled()


async def test_a_handshake_takes_only_so_long(
    ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_HANDSHAKE_S", 0.05)
    async with open_stand(**ours.flags()) as stand:
        for said in (b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
            writer.write(said)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
        monkeypatch.setattr(http_server, "_HANDSHAKE_S", 10.0)
        assert await asked(stand, ours.trusting()) == 200


async def test_many_clients_may_come_at_once_over_https(ours: Authority) -> None:
    async with open_stand(**ours.flags()) as stand:
        trusting = ours.trusting()
        assert set(await asyncio.gather(*(asked(stand, trusting) for _ in range(40)))) == {200}
        stand.assert_settled()


async def test_a_router_stops_with_handshakes_under_way(ours: Authority) -> None:
    async with open_stand(**ours.flags()) as stand:
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
        server: Any = stand.router._runner.server  # type: ignore[union-attr]
        await stand.until(lambda: server._greeting)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
