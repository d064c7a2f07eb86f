"""The router process of a soak: a plain router that says how it is whenever it is asked.

A line on standard input asks; the answer is a line of JSON on standard output. The end of
standard input stops it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions


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
        log_level="error",
    )
    loop = asyncio.get_running_loop()
    async with Router(options, DispatchOptions(policy="slack")) as router:
        print(router.port, flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            gc.collect()  # what is only waiting for the collector is no leak
            print(json.dumps(sample(router)), flush=True)


def main() -> None:
    """Run a router before the engines that the arguments name."""
    import uvloop

    loop = uvloop.new_event_loop()
    loop.run_until_complete(_serve(sys.argv[1:]))


if __name__ == "__main__":
    main()
