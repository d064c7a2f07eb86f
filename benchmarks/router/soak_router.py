"""The router process of a soak: a plain router that says how it is whenever it is asked.

An empty line on standard input asks; the answer is a line of JSON on standard output. A line with
a number takes all its file descriptors for so many seconds and is answered after them. The end of
standard input stops it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions

STALL_S: Final = 5.0
"""How long the router bears a client that does not read, seconds."""
_LOOK_EVERY_S: Final = 0.02


class Lookout:
    """Notes when the router takes engines out.

    Attributes:
        outs: name of the engine and time, since they were last asked for.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self.outs: list[tuple[str, float]] = []

    async def look(self) -> None:
        """Look at all engines, again and again."""
        ready: set[str] = set()
        while True:
            now = {engine.name for engine in self._router.context.fleet.ready()}
            self.outs += [(name, perf_counter()) for name in sorted(ready - now)]
            ready = now
            await asyncio.sleep(_LOOK_EVERY_S)


async def run_short(length_s: float) -> None:
    """Leave this process without a free descriptor for ``length_s`` seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    most = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        await asyncio.sleep(length_s)
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def sample(router: Router) -> dict[str, Any]:
    """Return what is open in ``router`` and what its process holds."""
    context = router.context
    book, coordinator = context.ledger, context.service.coordinator
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
        "files": len(os.listdir("/proc/self/fd")),
        "tasks": len(asyncio.all_tasks()),
        "engine_connections": router.engine_connections,
        "open_calls": book.open,
        "tries": len(context.guard.attempts),
        "held": coordinator.held,
        "waiting": context.service.waiting,
        "in_flight": sum(len(load.in_flight) for load in coordinator.engines.values()),
        "open_workflows": len(coordinator.workflows),
        "arrived": book.arrived.total(),
        "answered": book.answered(),
        "failed": book.failed(),
        "retries": book.retries.total(),
        "engines_up": len(context.fleet.ready()),
    }


async def _serve(urls: list[str]) -> None:
    options = RouterOptions(
        worker_urls=tuple(urls),
        port=0,
        health_check_interval_secs=0.5,
        stream_stall_timeout_secs=STALL_S,
        log_level="error",
    )
    loop = asyncio.get_running_loop()
    async with Router(options, DispatchOptions(policy="slack")) as router:
        print(router.port, flush=True)
        lookout = Lookout(router)
        looking = asyncio.ensure_future(lookout.look())
        while said := await loop.run_in_executor(None, sys.stdin.readline):
            if said.strip():
                await run_short(float(said))
                print("{}", flush=True)
                continue
            gc.collect()  # what is only waiting for the collector is no leak
            outs, lookout.outs = lookout.outs, []
            print(json.dumps({**sample(router), "outs": outs}), flush=True)
        looking.cancel()


def main() -> None:
    """Run a router before the engines that the arguments name."""
    import uvloop

    loop = uvloop.new_event_loop()
    loop.run_until_complete(_serve(sys.argv[1:]))


if __name__ == "__main__":
    main()
