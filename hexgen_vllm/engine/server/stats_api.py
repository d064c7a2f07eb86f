"""The schedulers' telemetry on its way from the engine processes to the HTTP server.

One utility call of vLLM's engine core carries it, one for each data-parallel rank. However many
clients ask, at most one is on the way: an engine that is busy with a long step is not made busier.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final

from hexgen_vllm.wire import plain

UTILITY: Final = "hexgen_stats"
TIMEOUT_S: Final = 5.0
"""How long an answer may take; the engine answers between two steps."""

_CORE: Final = "vllm.v1.engine.core"


class StatsUnavailable(Exception):  # noqa: N818 - an answer, not a defect
    """There is no telemetry to be had; ``status`` is the HTTP status that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def offer_utility() -> None:
    """Make the scheduler's snapshot reachable as a utility call of vLLM's engine core.

    Does nothing in a process that has not loaded the engine core: it does not run one.
    """
    module = sys.modules.get(_CORE)
    core = getattr(module, "EngineCore", None)  # None while the module is still being loaded
    if core is not None:
        setattr(core, UTILITY, _scheduler_stats)


def _scheduler_stats(core: Any) -> dict[str, Any] | None:
    """Return the snapshot of ``core``'s scheduler, ``None`` when it is not ours.

    ``engine`` is the core's number among all data-parallel ranks, as vLLM's own metrics have it.
    """
    stats = getattr(core.scheduler, UTILITY, None)
    return None if stats is None else {"engine": getattr(core, "engine_index", 0), **plain(stats())}


async def _ask_every_rank(core: Any) -> list[dict[str, Any] | None]:
    # vLLM's public call answers for the first rank only.
    asked = [core._call_utility_async(UTILITY, engine=engine) for engine in core.core_engines]
    return list(await asyncio.gather(*asked))


class StatsReader:
    """Reads snapshots for one HTTP server, one call at a time."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._call: asyncio.Task[list[dict[str, Any] | None]] | None = None

    async def read(self, engine_client: Any) -> list[dict[str, Any]]:
        """Return the scheduler's snapshot, or those of all data-parallel ranks of this server.

        Args:
            engine_client: vLLM's client of the engine, ``app.state.engine_client``.

        Raises:
            StatsUnavailable: the scheduler is not ours (404), or the engine is gone or does not
                answer in time (503).
        """
        core = getattr(engine_client, "engine_core", None)
        if core is None:
            raise StatsUnavailable("This server runs no engine.", 404)
        if self._call is None or self._call.done():
            self._call = asyncio.ensure_future(_ask_every_rank(core))
        try:
            # Shielded: who gives up waiting must not cancel the answer of the others.
            found = await asyncio.wait_for(asyncio.shield(self._call), self._timeout_s)
        except asyncio.TimeoutError:
            raise StatsUnavailable(f"No answer in {self._timeout_s:g} s.", 503) from None
        except Exception as error:  # vLLM has no common class: a dead engine, no such utility
            raise StatsUnavailable(f"The engine did not answer: {error}", 503) from error
        snapshots = [snapshot for snapshot in found if snapshot is not None]
        if len(snapshots) < len(found):
            raise StatsUnavailable("The engine does not run urgency scheduling.", 404)
        return snapshots
