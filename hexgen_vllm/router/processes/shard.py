"""One of several router processes that share a port: each workflow belongs to one of them.

A process that is sent a call of somebody else's workflow passes it on over a Unix socket, and the
answer back, byte for byte. So everything that is known of a workflow is in one place. Calls
without a workflow stay where they came in. If the owner cannot be reached, which lasts for as
long as it takes to start a new one, the call is served where it is.

All processes see the engines' own telemetry. What others have placed, which engines may not have
reported yet, they ask each other a few times a second. Their metrics are shown as those of one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web

from hexgen_vllm.errors import HexgenError
from hexgen_vllm.policy.engine_load import Elsewhere
from hexgen_vllm.router import errors
from hexgen_vllm.router.calls import headers
from hexgen_vllm.router.context import Context, read_body
from hexgen_vllm.router.http.client import Answer, UnixPool
from hexgen_vllm.router.http.messages import SENT, json_response
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.metrics import CONTENT_TYPE
from hexgen_vllm.router.processes.router_process import RouterProcess
from hexgen_vllm.router.route import DATA_PATH, LOAD_PATH, RESPONSE_PATH, ProcessScope, Route
from hexgen_vllm.router.status.overview import Overview, data_response, total

_SAMPLE: Final = re.compile(r"^(?P<key>[a-zA-Z_:][\w:]*(?:\{.*\})?) (?P<value>\S+)$")
# Counters that every process reads from the engines.
_SEEN_BY_ALL: Final = "_engine_preemptions_total"
_ASK_S: Final = 0.25
_PATIENCE_S: Final = 2.0
_CONNECT_S: Final = 1.0
_SMALL_BYTES: Final = 2**20
_LOG = logging.getLogger(__name__)
# Gauges that count what one process has; all others are the same in every process.
_SUMMED: Final = (
    "open_calls",
    "held_calls",
    "held_tokens",
    "client_connections",
    "slack_calls",
    "workflows_at_risk",
    "open_workflows",
    "engine_calls",
    "engine_tokens",
)


def merged_exposition(texts: Sequence[str]) -> str:
    """Return one exposition: counters and histograms summed, of most gauges the largest value.

    Args:
        texts: expositions in Prometheus's text format.
    """
    kinds: dict[str, str] = {}
    lines: list[str] = []
    values: dict[str, list[float]] = {}
    for text in texts:
        for line in text.splitlines():
            found = _SAMPLE.match(line)
            if line.startswith("# TYPE "):
                kinds[line.split()[2]] = line.split()[3]
            if found is None:
                if line not in values:
                    values[line] = []
                    lines.append(line)
            else:
                key = found["key"]
                if key not in values:
                    values[key] = []
                    lines.append(key)
                values[key].append(float(found["value"]))
    return "\n".join(_line(line, values[line], kinds) for line in _grouped(lines)) + "\n"


def _line(key: str, values: list[float], kinds: dict[str, str]) -> str:
    if not values:
        return key
    name = key.partition("{")[0]
    gauge = kinds.get(name) == "gauge"
    summed = name.endswith(_SUMMED) if gauge else not name.endswith(_SEEN_BY_ALL)
    if name.endswith("_created"):
        return f"{key} {min(values)!r}"
    return f"{key} {sum(values) if summed else max(values)!r}"


def _grouped(lines: list[str]) -> list[str]:
    """Return the lines with all samples of a metric behind its comments."""
    order: dict[str, list[str]] = {}
    family = ""
    for line in lines:
        if line.startswith("# "):
            family = line.split()[2]
        elif not _of(line, family):
            family = next((known for known in order if _of(line, known)), family)
        order.setdefault(family, []).append(line)
    return [line for found in order.values() for line in found]


def _of(line: str, family: str) -> bool:
    name = line.partition("{")[0].partition(" ")[0]
    return name == family or re.sub(r"_(bucket|sum|count|total|created)$", "", name) == family


class Shard:
    """Passes requests on to the processes they belong to.

    Args:
        process: which process this is.
        context: of its router.

    Attributes:
        passing: requests of which another process has yet to finish the answer.
    """

    def __init__(self, process: RouterProcess, context: Context) -> None:
        self._process, self._context = process, context
        self._pool = UnixPool(_CONNECT_S)
        self._overview = Overview(context)
        self.passing = 0

    async def take(self, request: Request, route: Route[Any]) -> web.StreamResponse | None:
        """Answer a request that is not only this process's; return ``None`` for all others."""
        if request.came_from_here:
            return None
        if route.scope is ProcessScope.ALL:
            return await self._with_others(request, route)
        asks = route.scope is ProcessScope.OWNER and request.method != "HEAD"
        owner = await self._owner(request, route) if asks else None
        if owner is None or owner == self._process.index:
            return None
        return await self._pass_on(request, owner)

    async def _with_others(self, request: Request, route: Route[Any]) -> web.StreamResponse | None:
        """Answer for all processes, or have each of them do what the request wants."""
        if route.path == "/metrics":
            return await self._metrics()
        if route.path == DATA_PATH:
            return await self._overview_of_all()
        await self._tell_others(request)
        return None

    async def _owner(self, request: Request, route: Route[Any]) -> int | None:
        if route.endpoint is None:
            session = request.query.get("session_id")
        else:
            try:
                body = await read_body(request)
                session = await self._context.intake.session(route.endpoint, request.names, body)
            except HexgenError:
                return None  # to be answered as such
        return None if not session else self._process.owner(session)

    async def _pass_on(self, request: Request, owner: int) -> web.StreamResponse | None:
        self.passing += 1
        answer: Answer | None = None
        try:
            answer = await self._ask(owner, request)
            await _relay(answer, request)
        except OSError:
            if request.answering:
                return errors.hung_up(request)
            _LOG.warning("served elsewhere than it belongs: process %d does not answer", owner)
            return None
        finally:
            self.passing -= 1
            if answer is not None:
                answer.close()
        return SENT

    async def _ask(self, index: int, request: Request) -> Answer:
        body = await read_body(request)
        head = headers.passed_on_head(request.method, request.path_qs, request.pairs, len(body))
        return await self._pool.ask(self._process.socket(index), head, body)

    async def _tell_others(self, request: Request) -> None:
        """Have a change to the engines made in every process."""
        for index in self._process.others():
            try:
                answer = await asyncio.wait_for(self._ask(index, request), _PATIENCE_S)
                await answer.body(_SMALL_BYTES)
                answer.close()
            except (OSError, asyncio.TimeoutError):
                _LOG.warning("a change to the engines did not reach process %d", index)

    # What all know together

    async def load(self, request: Request) -> web.StreamResponse:
        """Say what calls this process has placed, to another one."""
        engines = self._context.service.coordinator.engines.items()
        return json_response({name: load.own() for name, load in engines})

    async def response(self, request: Request) -> web.StreamResponse:
        """Say which engine has a stored response, to another process."""
        context = self._context
        name = context.stored.engine_of(request.query.get("id", ""), context.clock.now())
        return json_response({"engine": name})

    async def engine_of(self, response: str) -> str | None:
        """Ask the others which engine has a stored response; ``None`` if they do not know."""
        path = f"{RESPONSE_PATH}?id={quote(response, safe='')}"
        found = await asyncio.gather(*(self._get(i, path) for i in self._process.others()))
        names = [json.loads(raw)["engine"] for raw in found if raw]
        return next((name for name in names if name is not None), None)

    async def run(self) -> None:
        """Ask the others for their calls, again and again."""
        while True:
            await asyncio.sleep(_ASK_S)
            found = await asyncio.gather(*(self._get(i, LOAD_PATH) for i in self._process.others()))
            try:
                self._take_in([json.loads(raw) for raw in found if raw])
            except Exception:  # whatever another process said, ask it again
                _LOG.exception("what other processes have placed cannot be read")

    def _take_in(self, loads: Sequence[dict[str, Any]]) -> None:
        names = {name for one in loads for name in one}
        total = {
            name: Elsewhere.total(Elsewhere(*one[name]) for one in loads if name in one)
            for name in names
        }
        self._context.service.placed_elsewhere("processes", total)

    async def _metrics(self) -> web.StreamResponse:
        own = self._context.metrics.exposition()
        texts = await asyncio.gather(*(self._get(i, "/metrics") for i in self._process.others()))
        body = merged_exposition([own.decode(), *(text.decode() for text in texts if text)])
        return web.Response(body=body.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _overview_of_all(self) -> web.StreamResponse:
        bodies = await asyncio.gather(*(self._get(i, DATA_PATH) for i in self._process.others()))
        parts = [json.loads(body) for body in (self._overview.body(), *bodies) if body]
        known = [part for part in parts if "calls" in part]  # else it could not answer
        return data_response(json.dumps(total(known)).encode())

    async def _get(self, index: int, path: str) -> bytes:
        """Return what another process says, empty if it does not."""
        head = f"GET {path} HTTP/1.1\r\nhost: router\r\n\r\n".encode()
        try:
            answer = await asyncio.wait_for(
                self._pool.ask(self._process.socket(index), head, b""), _PATIENCE_S
            )
            try:
                return await asyncio.wait_for(answer.body(2**26), _PATIENCE_S) or b""
            finally:
                answer.close()
        except (OSError, asyncio.TimeoutError):
            return b""

    def close(self) -> None:
        """Close the connections to the others."""
        self._pool.close()


async def _relay(answer: Answer, request: Request) -> None:
    """Write another process's answer as it is."""
    request.marked = True
    head = headers.passed_back_lines(answer.pairs)
    length = answer.header(b"content-length")
    if length.isdecimal() and int(length) <= _SMALL_BYTES:
        request.reply(answer.status, head, await answer.body(_SMALL_BYTES) or b"")
        return
    request.begin(answer.status, head, int(length) if length.isdecimal() else None, b"")
    request.draw_from(answer)
    await answer.pour(request.send)
    request.end()
