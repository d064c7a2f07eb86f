"""A process that is started again whenever it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

from hexgen_vllm.clock import Clock
from hexgen_vllm.cluster.backoff import Backoff
from hexgen_vllm.cluster.process import Process, ProcessFailed
from hexgen_vllm.cluster.spec import ClusterSpec


async def keep(
    process: Process,
    start: Callable[[], Awaitable[None]],
    spec: ClusterSpec,
    *,
    clock: Clock,
    report: Callable[[str], None],
) -> NoReturn:
    """Start ``process`` again whenever it dies, until cancelled.

    Args:
        process: what runs now.
        start: starts it and waits until it is healthy; raises ``ProcessFailed`` where it cannot.
        spec: how long to wait before a start, and for the end of one that failed.
        clock: tells how long it lived.
        report: gets one line for each death and each start that failed.
    """
    backoff = Backoff(spec.restart_after_s)
    while True:
        since_s = clock.now()
        code = await process.wait()
        process.kill()  # what a crashed server left in its session
        delay_s = backoff.after(clock.now() - since_s)
        report(f"{process.name}: died with exit code {code}, again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        try:
            await start()
        except ProcessFailed as error:
            report(str(error))
            await process.stop(spec.stop_grace_s)
