"""``hexgen-vllm bench replicas``: several routers under load while routers and their store die.

Workflows of a few calls each, all with a deadline that only their first call says, go through a
balancer to routers in front of fake engines. In the middle of it one router is killed (and started
again), the store is killed, and stalled; at the end each router is replaced in turn. A client sends
a call again when its connection broke or it was refused, as SDKs do. The balancer is a few lines
here that send a workflow to one router (rendezvous hashing), or nginx, set up as in
docs/replicas.md.

It fails if a call came to no end, if a router that lives has a call in its book that did not end,
if a workflow lost its deadline, or if a call failed while routers were replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from time import monotonic
from typing import Any, Final

import aiohttp

from benchmarks.router.redis_server import HINT, RedisServer, program
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings

_STAGES: Final = ("plan", "draft", "check", "answer")
_DEADLINE_S: Final = 30.0
_SLACK_S: Final = 1.0  # a deadline may seem to be so much later than it is
_PAUSE_S: Final = 0.1
_PATIENCE_S: Final = 60.0
_SAMPLE: Final = re.compile(r"^hexgen_router_(\w+?)(?:\{.*\})? (\S+)$", re.M)
NGINX: Final = """
error_log {folder}/error.log;
pid {folder}/pid;
daemon off;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  map $http_x_hexgen_workflow_id $workflow {{
    default $http_x_hexgen_workflow_id;
    ""      $request_id;
  }}
  upstream routers {{
    hash $workflow consistent;
    {servers}
    keepalive 64;
  }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 64m;
    location / {{
      proxy_pass http://routers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_buffering off;
      proxy_read_timeout 1h;
      proxy_next_upstream error http_503 non_idempotent;
    }}
  }}
}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--routers", type=int, default=3, help="router processes")
    parser.add_argument("--engines", type=int, default=4, help="fake engines, of 8 slots each")
    parser.add_argument("--engine-urls", nargs="+", help="real engines instead, of one model")
    parser.add_argument("--model", default="tiny", help="that they serve")
    parser.add_argument("--rate", type=float, default=10.0, help="workflows per second")
    parser.add_argument("--phase", type=float, default=8.0, help="seconds from event to event")
    parser.add_argument("--nginx", action="store_true", help="balance with nginx")


class Router:
    """A router process."""

    def __init__(self, engines: list[str], store: str) -> None:
        self.port, self._store = free_ports("127.0.0.1", 1)[0], store
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable, "-m", "hexgen_vllm.router", "--port", str(self.port),
            "--log-level", "warning", "--worker-urls", *engines,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not ready at once."""
        environment = {**os.environ, "HEXGEN_ROUTER_REPLICAS": self._store}
        self._process = subprocess.Popen(self._command, env=environment)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> None:
        """Wait until it is gone."""
        assert self._process is not None
        await asyncio.to_thread(self._process.wait)

    def close(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(slots=True)
class Book:
    """What clients saw.

    Attributes:
        tries: by what became of them: a status, or ``broken``.
        took_s: from the first try to the answer, by time of the answer.
        lost: calls without any answer in the end.
        late: workflows that ended after their deadline.
        forgotten: answers that speak of a later deadline than there is.
    """

    tries: Counter[str] = field(default_factory=Counter)
    took_s: list[tuple[float, float]] = field(default_factory=list)
    workflows: int = 0
    lost: int = 0
    late: int = 0
    forgotten: int = 0


class Scene:
    """Routers, engines, store and clients."""

    def __init__(self, args: argparse.Namespace, urls: list[str], store: RedisServer) -> None:
        self.args, self.store, self.book = args, store, Book()
        self.routers = [Router(urls, store.url) for _ in range(args.routers)]
        self.down: dict[str, float] = {}
        self.front: str | None = None
        self.session: aiohttp.ClientSession

    def order(self, workflow: str) -> list[str]:
        """Return where to send a call of a workflow, first choice first."""
        if self.front is not None:
            return [self.front]
        now = monotonic()

        def key(router: Router) -> tuple[bool, bytes]:
            digest = hashlib.blake2b(f"{workflow} {router.port}".encode(), digest_size=8).digest()
            return self.down.get(router.url, 0.0) > now, digest

        return [router.url for router in sorted(self.routers, key=key)]

    async def call(self, workflow: str, stage: str, ends_s: float, *, first: bool) -> bool:
        """Make a call, again and again if need be; return whether it was answered."""
        headers = {"x-hexgen-workflow-id": workflow, "x-hexgen-stage": stage}
        headers["x-hexgen-workflow-type"] = "chaos"
        if first:
            headers["x-hexgen-workflow-deadline-ms"] = str(int(1000 * (ends_s - monotonic())))
        if stage == _STAGES[-1]:
            headers["x-hexgen-workflow-final"] = "1"
        text = f"{workflow} " + "schema " * 200
        body = {"model": self.args.model, "max_tokens": 16, "messages": [
            {"role": "user", "content": text + stage}]}  # fmt: skip
        began_s = monotonic()
        while monotonic() < began_s + _PATIENCE_S:
            if await self._try(workflow, body, headers, ends_s):
                self.book.took_s.append((monotonic(), monotonic() - began_s))
                return True
            await asyncio.sleep(_PAUSE_S)
        self.book.lost += 1
        return False

    async def _try(
        self, workflow: str, body: dict[str, Any], headers: dict[str, str], ends_s: float
    ) -> bool:
        for url in self.order(workflow):
            where = f"{url}/v1/chat/completions"
            try:
                async with self.session.post(where, json=body, headers=headers) as answer:
                    await answer.read()
                    if answer.status == 503 and self.front is None:
                        self.down[url] = monotonic() + 1.0
                        continue  # as the balancer would
                    self.book.tries[str(answer.status)] += 1
                    slack = answer.headers.get("x-hexgen-slack-ms")
            except aiohttp.ClientConnectorError:
                self.down[url] = monotonic() + 1.0
                continue
            except (aiohttp.ClientError, OSError):
                self.book.tries["broken"] += 1
                return False
            if slack is not None and float(slack) / 1e3 > ends_s - monotonic() + _SLACK_S:
                self.book.forgotten += 1
            return answer.status == 200
        self.book.tries["nobody"] += 1
        return False

    async def workflow(self, name: str) -> None:
        """Play a workflow."""
        ends_s = monotonic() + _DEADLINE_S
        for i, stage in enumerate(_STAGES):
            if not await self.call(name, stage, ends_s, first=i == 0):
                return
        self.book.workflows += 1
        self.book.late += monotonic() > ends_s

    async def numbers(self, router: Router) -> Counter[str]:
        """Return a router's metrics, summed over labels."""
        async with self.session.get(f"{router.url}/metrics") as answer:
            text = await answer.text()
        found: Counter[str] = Counter()
        for name, value in _SAMPLE.findall(text):
            if value != "+Inf":
                found[name] += float(value)  # type: ignore[assignment]
            else:
                found[name] = math.inf  # type: ignore[assignment]
        return found

    async def together(self, count: int) -> float:
        """Wait until ``count`` routers all see each other; return how long it took, seconds."""
        return await took(lambda: self._together(count))

    async def _together(self, count: int) -> bool:
        seen = 0
        for router in self.routers:
            try:
                found = await self.numbers(router)
            except (aiohttp.ClientError, OSError):
                continue
            ready = found["ready_engines"] > 0
            seen += ready and found["replicas"] == count - 1 and found["replicas_age_seconds"] < 1
        return seen == count


async def took(true: Callable[[], Awaitable[bool]]) -> float:
    """Wait until something is true; return how long it took, seconds."""
    began_s = monotonic()
    while not await true():
        if monotonic() > began_s + _PATIENCE_S:
            raise ConfigError("bench replicas: the routers do not find together.")
        await asyncio.sleep(0.02)
    return round(monotonic() - began_s, 2)


async def play(args: argparse.Namespace) -> dict[str, Any]:
    """Play everything; return what was seen."""
    if program() is None:
        raise ConfigError(f"bench replicas: {HINT}.")
    async with AsyncExitStack() as stack:
        urls = args.engine_urls
        if not urls:
            settings = FakeSettings(slots=8, step_s=0.01, default_tokens=16)
            fakes = [FakeServer(settings) for _ in range(args.engines)]
            urls = [(await stack.enter_async_context(fake)).url for fake in fakes]
        store = stack.enter_context(RedisServer())
        scene = Scene(args, urls, store)
        scene.session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        for router in scene.routers:
            router.start()
            stack.callback(router.close)
        await scene.together(args.routers)
        if args.nginx:
            scene.front = _start_nginx(stack, scene.routers)
            await asyncio.sleep(0.5)
        load = asyncio.create_task(_load(scene))
        seen = await _events(scene)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        books = [await scene.numbers(router) for router in scene.routers]
    open_calls = sum(int(book["calls_received_total"] - book["calls_total"]) for book in books)
    return {**seen, "open_calls": open_calls, **_summary(scene.book)}


async def _load(scene: Scene) -> None:
    """Begin workflows until cancelled, then wait for those that have begun."""
    running: set[asyncio.Task[None]] = set()
    try:
        for i in range(10**9):
            task = asyncio.create_task(scene.workflow(f"w{i}"))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(1.0 / scene.args.rate)
    except asyncio.CancelledError:
        await asyncio.gather(*running)


async def _events(scene: Scene) -> dict[str, Any]:
    args, book, seen = scene.args, scene.book, dict[str, Any]()
    victim, phase = scene.routers[0], args.phase

    def failed() -> int:
        return sum(n for what, n in book.tries.items() if what != "200")

    await asyncio.sleep(phase)
    began, before = monotonic(), failed()
    victim.send(signal.SIGKILL)
    await victim.ended()
    seen["kill_router_others_know_s"] = await scene.together(args.routers - 1)
    victim.start()
    seen["kill_router_back_s"] = await scene.together(args.routers)
    seen["kill_router_longest_silence_s"] = _silence(book, began)
    seen["kill_router_failed_tries"] = failed() - before
    await asyncio.sleep(phase)
    for what, event, end in (
        ("kill_store", scene.store.kill, scene.store.start),
        ("stall_store", scene.store.stall, scene.store.go_on),
    ):
        began, before = monotonic(), failed()
        event()
        await asyncio.sleep(phase)
        end()
        seen[f"{what}_back_s"] = await scene.together(args.routers)
        seen[f"{what}_longest_silence_s"] = _silence(book, began)
        seen[f"{what}_failed_tries"] = failed() - before
        await asyncio.sleep(phase / 2)
    began, before = monotonic(), failed()
    for router in scene.routers:
        router.send(signal.SIGTERM)
        await router.ended()
        router.start()
        await scene.together(args.routers)
    seen["replace_all_longest_silence_s"] = _silence(book, began)
    seen["replace_all_failed_tries"] = failed() - before
    return seen


def _silence(book: Book, since_s: float) -> float:
    """Return the longest time without an answer since a moment, seconds."""
    times = [since_s, *(at_s for at_s, _ in book.took_s if at_s > since_s)]
    return round(max((b - a for a, b in pairwise(times)), default=0.0), 2)


def _summary(book: Book) -> dict[str, Any]:
    cuts = quantiles([took_s for _, took_s in book.took_s], n=100)
    return {
        "calls_answered": len(book.took_s),
        "workflows": book.workflows,
        "tries": dict(book.tries),
        "lost": book.lost,
        "late": book.late,
        "deadlines_forgotten": book.forgotten,
        "p50_s": round(cuts[49], 3),
        "p99_s": round(cuts[98], 3),
    }


def _start_nginx(stack: AsyncExitStack, routers: list[Router]) -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        raise ConfigError("bench replicas: no nginx here.")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hexgen-nginx-")))
    port, file = free_ports("127.0.0.1", 1)[0], folder / "nginx.conf"
    servers = "\n    ".join(f"server 127.0.0.1:{r.port} fail_timeout=1s;" for r in routers)
    file.write_text(NGINX.format(folder=folder, servers=servers, port=port))
    process = subprocess.Popen([found, "-c", str(file), "-p", str(folder), "-g", "user root;"])
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return f"http://127.0.0.1:{port}"


def main(args: argparse.Namespace) -> int:
    """Run; return 1 if something was lost."""
    seen = asyncio.run(play(args))
    print(json.dumps(seen, indent=2))
    wrong = ("lost", "open_calls", "deadlines_forgotten", "replace_all_failed_tries")
    return int(any(seen[name] for name in wrong))


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
