"""A fake engine server: the OpenAI endpoints of vLLM without a model, and ways to misbehave.

    async with FakeServer(FakeSettings(step_s=0.001)) as server:
        server.faults.append(Fault("reset", after=3))
        ... talk to server.url ...
        assert server.received[0].headers["x-request-id"] == "r1"

``python -m hexgen_vllm.testing.fake_server --port 8001`` runs one until it is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from hexgen_vllm.router.engines.ranks import RANK_HEADER
from hexgen_vllm.testing import fake_answers, fake_tokens
from hexgen_vllm.testing.fake_settings import FakeSettings, Fault, FaultKind, Received

__all__ = ["FakeServer", "FakeSettings", "Fault", "Received"]

_MAX_BODY_BYTES = 2**29
_COUNTING = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
_STREAMED = "text/event-stream"
_ENDING = ("reset", "close", "half", "garbage")  # faults that end the connection from this side


@dataclass(slots=True)
class RankCounts:
    """Counts by rank; a request that names no rank counts for the first."""

    running: Counter[int] = field(default_factory=Counter)
    waiting: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)


def rank_asked(headers: Mapping[str, str]) -> int:
    """Return the rank that a request is for, as vLLM reads it: what is no number is not said."""
    said = headers.get(RANK_HEADER, "")
    return int(said) if said.lstrip("-").isdecimal() else 0


def _metrics(counts: RankCounts, ranks: int) -> str:
    """Return vLLM's metrics of an engine with so many ranks."""
    return "".join(_of_rank(counts, rank, 100 * ranks) for rank in range(ranks))


def _of_rank(counts: RankCounts, rank: int, all_blocks: int) -> str:
    label = f'{{engine="{rank}",model_name="tiny"}}'
    cache = f'{{block_size="16",engine="{rank}",num_gpu_blocks="{all_blocks}"}}'
    return (
        f"vllm:num_requests_running{label} {counts.running[rank]:.1f}\n"
        f"vllm:num_requests_waiting{label} {counts.waiting[rank]:.1f}\n"
        f"vllm:kv_cache_usage_perc{label} 0.25\n"
        f"vllm:num_preemptions_total{label} 3.0\n"
        f"vllm:iteration_tokens_total_count{label} {counts.steps[rank]:.1f}\n"
        f"vllm:cache_config_info{cache} 1.0\n"
    )


@dataclass(slots=True)
class FakeServer:
    """A fake engine on 127.0.0.1.

    Attributes:
        settings: how it behaves.
        faults: what the next generation requests meet, one each.
        fault: what every generation request meets when ``faults`` is empty.
        received: generation requests so far.
        finished: workflows whose end was told, which an engine has no use for.
        healthy: whether ``/health`` says so.
        aborted: requests whose client went away before the end.
        counts: by rank, requests being answered, those waiting for a slot, and pieces of answers
            sent, which count as engine steps.
        port: its port, once started.
        tls: what it serves HTTPS with.
    """

    settings: FakeSettings = field(default_factory=FakeSettings)
    faults: deque[Fault] = field(default_factory=deque)
    fault: Fault | None = None
    received: list[Received] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    healthy: bool = True
    aborted: int = 0
    counts: RankCounts = field(default_factory=RankCounts)
    port: int = 0
    tls: ssl.SSLContext | None = None
    _runner: web.ServerRunner | None = None
    _slots: asyncio.Semaphore | None = None

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def down(self) -> bool:
        """Whether it is not started, or dead."""
        return self._runner is None

    async def start(self) -> None:
        """Listen; after :meth:`stop`, on the same port as before."""
        self._slots = asyncio.Semaphore(self.settings.slots)
        server = web.Server(
            self._handle, request_factory=_request, handler_cancellation=True, access_log=None
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner,
            "127.0.0.1",
            self.port,
            reuse_address=True,
            backlog=2048,
            ssl_context=self.tls,
        )
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Die: abort every connection and refuse new ones."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            if runner.server is not None:
                for connection in runner.server.connections:
                    if connection.transport is not None:
                        connection.transport.abort()
            await runner.cleanup()

    async def __aenter__(self) -> FakeServer:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST" and request.path in fake_answers.PATHS:
            return await self._generate(request)
        if request.path in self.settings.echoes:
            return await self._echo(request)
        if request.method == "POST":
            return await self._tokenize(request)
        content = self._page(request.path)
        if content is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        if isinstance(content, str):
            return web.Response(text=content, status=200 if self.healthy else 503)
        return web.json_response(content)

    def _page(self, path: str) -> Any:
        settings = self.settings
        if path == "/v1/models":
            return {"object": "list", "data": settings.cards()}
        if path == "/server_info" and self.settings.policy:
            said = {"policy": self.settings.policy, "max_num_seqs": self.settings.slots}
            return {"vllm_config": {"scheduler_config": said}}
        metrics = _metrics(self.counts, settings.ranks) if settings.metrics else ""
        stats = None if settings.rust else settings.stats
        version = {
            "version": "0.0.0",
            **({"rust_frontend_version": "0.0.0"} if settings.rust else {}),
        }
        pages = {"/health": "", "/metrics": metrics, "/hexgen/stats": stats, "/version": version}
        return pages.get(path)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return self.counts.running.total()

    @property
    def waiting(self) -> int:
        """Requests waiting for a slot."""
        return self.counts.waiting.total()

    @property
    def steps(self) -> int:
        """Pieces of answers sent."""
        return self.counts.steps.total()

    async def _tokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/finish_session":
            self.finished.append(request.query.get("session_id", ""))
        if request.path not in _COUNTING:
            return web.json_response({"detail": "Not Found"}, status=404)
        await self._note(request)
        if self.fault is not None and self.fault.kind == "status":
            return _status(self.fault)
        ids = [1, 2, 3]
        if self.settings.event_tokens and request.path == "/tokenize":
            body = json.loads(self.received[-1].body)
            ids = fake_tokens.prompt_ids(fake_tokens.PATHS["messages" not in body], body)
        return web.json_response({"count": len(ids), "tokens": ids, "prompt": "abc"})

    async def _echo(self, request: web.BaseRequest) -> web.StreamResponse:
        """Say what came, as JSON or, if the query asks for it, as events."""
        fault = self.faults.popleft() if self.faults else self.fault
        body = await self._note(request)
        if fault is not None and fault.kind == "status":
            return _status(fault)
        if fault is not None and fault.after is None:
            await _break(request, fault.kind)
        said = {"method": request.method, "path": request.path, "bytes": len(body)}
        if "stream" not in request.query_string:
            return web.json_response(said)
        events = [b"data: %d\n\n" % i for i in range(self.settings.default_tokens)]
        return await self._pieces(request, events, fault, {"Content-Type": _STREAMED})

    async def _note(self, request: web.BaseRequest) -> bytes:
        body = await request.read()
        self.received.append(Received(request.method, request.path_qs, request.headers, body))
        return body

    async def _generate(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self.faults.popleft() if self.faults else self.fault
        raw = await self._note(request)
        try:
            return await self._answer(request, raw, fault)
        except asyncio.CancelledError:
            self.aborted += fault is None or fault.kind not in _ENDING
            raise

    async def _answer(
        self, request: web.BaseRequest, raw: bytes, fault: Fault | None
    ) -> web.StreamResponse:
        if fault is not None and fault.kind == "status":
            return _status(fault)
        if fault is not None and fault.after is None and fault.kind != "drip":
            await _break(request, fault.kind)
        body = json.loads(raw)
        if (body.get("model") or self.settings.models[0]) not in self.settings.served:
            return _status(Fault("status", status=404))
        rank = rank_asked(request.headers)
        if not 0 <= rank < self.settings.ranks:
            return _status(Fault("status", status=400))
        work = fake_answers.read_work(
            request.path,
            body,
            cached=self.settings.cached_tokens,
            default_tokens=self.settings.default_tokens,
        )
        if self._slots is None:
            raise RuntimeError("the server is not started")
        self.counts.waiting[rank] += 1
        try:
            await self._slots.acquire()
        finally:
            self.counts.waiting[rank] -= 1
        self.counts.running[rank] += 1
        try:
            return await self._send(request, work, fault, body)
        finally:
            self.counts.running[rank] -= 1
            self._slots.release()

    async def _send(
        self,
        request: web.BaseRequest,
        work: fake_answers.AskedAnswer,
        fault: Fault | None,
        body: dict[str, Any],
    ) -> web.StreamResponse:
        rate = self.settings.prefill_tokens_per_s
        if rate:
            await asyncio.sleep((work.prompt_tokens - work.cached_tokens) / rate)
        if work.stream:
            kind = {"Content-Type": "text/event-stream; charset=utf-8"}
            events, sizes = fake_answers.events(work), self.settings.event_tokens
            if sizes and work.path in fake_tokens.PATHS:
                name = f"{self.port}-{len(self.received)}"
                events = fake_tokens.events(work.path, body, name, sizes)
            return await self._pieces(request, events, fault, kind)
        whole = fake_answers.body(work)
        params = body.get("kv_transfer_params") or {}
        if params.get("do_remote_decode") and self.settings.kv_transfer_params is not None:
            told = {"kv_transfer_params": self.settings.kv_transfer_params}
            whole = json.dumps({**json.loads(whole), **told}).encode()
        await asyncio.sleep(self.settings.step_s * work.output_tokens)
        half = len(whole) // 2
        kind = {"Content-Type": "application/json", "Content-Length": str(len(whole))}
        return await self._pieces(request, (whole[:half], whole[half:]), fault, kind)

    async def _pieces(
        self,
        request: web.BaseRequest,
        pieces: Iterable[bytes],
        fault: Fault | None,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for sent, piece in enumerate(pieces):
            if fault is not None and fault.after == sent:
                if fault.kind == "cut":
                    break
                await _break(request, fault.kind)
            if fault is not None and fault.kind == "drip":
                await _drip(response, piece)
            else:
                await response.write(piece)
            self.counts.steps[rank_asked(request.headers)] += 1
            await asyncio.sleep(self.settings.step_s)
        await response.write_eof()
        return response


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(
        message, payload, protocol, writer, task, loop, client_max_size=_MAX_BODY_BYTES
    )


def _status(fault: Fault) -> web.Response:
    said = {"message": "as asked", "type": "fake_error", "param": None, "code": fault.status}
    body = json.dumps({"error": said}).encode() if fault.body is None else fault.body
    headers = CIMultiDict(fault.headers)
    headers.setdefault("Content-Type", "application/json")
    return web.Response(status=fault.status, body=body, headers=headers)


async def _drip(response: web.StreamResponse, piece: bytes) -> None:
    for i in range(len(piece)):
        await response.write(piece[i : i + 1])
        await asyncio.sleep(0)


async def _break(request: web.BaseRequest, kind: FaultKind) -> None:
    """Carry out a fault of the connection; ends when the connection does."""
    transport = request.transport
    if kind in _ENDING and transport is not None:
        if kind == "garbage":
            transport.write(b"\x00\xffno chunk, no header\r\n\r\n")
        if kind == "reset":
            transport.abort()
        elif kind == "half":
            transport.write_eof()
        else:
            transport.close()
    await asyncio.Event().wait()


def main(argv: list[str] | None = None) -> None:
    """Run a fake engine until it is interrupted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.0)
    args = parser.parse_args(argv)
    asyncio.run(_serve(args.port, FakeSettings(step_s=args.step_s)))


async def _serve(port: int, settings: FakeSettings) -> None:
    async with FakeServer(settings, port=port) as server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    main()
