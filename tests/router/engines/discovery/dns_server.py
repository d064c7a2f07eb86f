"""A real DNS server on 127.0.0.1, UDP and TCP, whose zone tests change while it runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

ZONE = "svc.test."


@dataclass
class DnsServer:
    """Answers from ``records``; a name that has none there does not exist.

    Attributes:
        records: texts of records by name and kind; an empty list is a name without them.
        beside: the same, sent along with SRV answers.
        ttl_s: of every record.
        rcode: what every question is answered with instead, such as ``SERVFAIL``.
        delay_s: how long answers take.
        silent: kinds that get no answer at all.
        asked: questions by transport.
    """

    records: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    beside: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    ttl_s: int = 0
    rcode: str | None = None
    delay_s: float = 0.0
    silent: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def set(self, name: str, kind: str, *texts: str) -> None:
        """Let ``name`` have these records of a kind."""
        self.records[name, kind] = list(texts)

    def forget(self, name: str) -> None:
        """Let ``name`` not exist."""
        self.records = {key: texts for key, texts in self.records.items() if key[0] != name}

    async def answer(self, wire: bytes, transport: str) -> bytes | None:
        """Return the answer to a question, ``None`` for silence."""
        query = dns.message.from_wire(wire)
        kind = dns.rdatatype.to_text(query.question[0].rdtype)
        self.asked[transport] += 1
        await asyncio.sleep(self.delay_s)
        if kind in self.silent:
            return None
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA
        if self.rcode is not None:
            response.set_rcode(dns.rcode.from_text(self.rcode))
        else:
            self._fill(response, query.question[0].name, kind)
        size = 65535 if transport == "tcp" else max(query.payload, 512)
        try:
            return response.to_wire(max_size=size)
        except dns.exception.TooBig:
            response.answer.clear()
            response.flags |= dns.flags.TC
            return response.to_wire()

    def _fill(self, response: dns.message.Message, name: dns.name.Name, kind: str) -> None:
        known = _text(name)
        if not any(one == known for one, _ in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        for alias in self.records.get((known, "CNAME"), ()):
            self._add(response, name, "CNAME", [alias])
            name = dns.name.from_text(alias)
        self._add(response, name, kind, self.records.get((_text(name), kind), []))
        if kind == "SRV":
            for (other, of), texts in self.beside.items():
                response.additional.append(
                    dns.rrset.from_text_list(f"{other}.", self.ttl_s, "IN", of, texts)
                )

    def _add(
        self, response: dns.message.Message, name: dns.name.Name, kind: str, texts: list[str]
    ) -> None:
        if texts:
            response.answer.append(dns.rrset.from_text_list(name, self.ttl_s, "IN", kind, texts))

    async def serve_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer one question over TCP."""
        size = int.from_bytes(await reader.readexactly(2), "big")
        found = await self.answer(await reader.readexactly(size), "tcp")
        if found is not None:
            writer.write(len(found).to_bytes(2, "big") + found)
            await writer.drain()
        writer.close()


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server, self._tasks = server, set[asyncio.Task[None]]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.ensure_future(self._answer(data, addr))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, data: bytes, addr: tuple[str, int]) -> None:
        found = await self._server.answer(data, "udp")
        if found is not None and not self._transport.is_closing():
            self._transport.sendto(found, addr)


@asynccontextmanager
async def dns_server() -> AsyncIterator[DnsServer]:
    """Run a server on a free port, the same for UDP and TCP."""
    server, loop = DnsServer(), asyncio.get_running_loop()
    streams = await asyncio.start_server(server.serve_stream, "127.0.0.1", 0)
    server.port = streams.sockets[0].getsockname()[1]
    udp, _ = await loop.create_datagram_endpoint(
        lambda: _Udp(server), local_addr=("127.0.0.1", server.port)
    )
    try:
        yield server
    finally:
        udp.close()
        streams.close()
