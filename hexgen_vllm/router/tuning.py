"""Tunes a running router: watches traffic, searches in a process of its own, turns the knobs.

The search is ``hexgen-vllm tune`` at the lowest priority: whatever happens to it, calls go on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from hexgen_vllm.clock import Clock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import HexgenError
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.recent import RecentWorkflow, Ring
from hexgen_vllm.report.summary import min_deadline
from hexgen_vllm.tune.online import (
    PRESENT,
    TUNED,
    Action,
    OnlineOptions,
    OnlineTuner,
    Proposal,
    TuningPhase,
)
from hexgen_vllm.tune.traffic import Live, blocks, live_loss, traffic
from hexgen_vllm.types import Role

_LOG = logging.getLogger(__name__)
_LOOK_S: Final = 5.0
_SEARCH_LIMIT_S: Final = 900.0
_SHARE: Final = 0.95
_SEEDS: Final = ("1", "2", "3")
_TUNED: Final = frozenset({"paper", "slack"})

Files = tuple[str, str]
"""Recent workflows as JSON lines, and the fleet as YAML (JSON is YAML)."""
Search = Callable[[Files, DispatchOptions, OnlineOptions], Awaitable[dict[str, Any]]]
Apply = Callable[[Mapping[str, float]], None]


class SearchFailed(HexgenError):  # noqa: N818 - an answer, not a defect
    """A search ended without a result; ``str()`` says why."""


class Tuning:
    """Tunes one router; :meth:`run` goes on until it is cancelled.

    Args:
        options: mode, periods, thresholds.
        coordinator: of the router; engines and placement options are read from it.
        clock: its time.
        ring: recent workflows.
        apply: turns the knobs.
        search: runs a search; another process by default.
    """

    def __init__(
        self,
        options: OnlineOptions,
        coordinator: Coordinator,
        clock: Clock,
        ring: Ring,
        apply: Apply,
        search: Search | None = None,
    ) -> None:
        self._options, self._coordinator, self._clock = options, coordinator, clock
        self._ring, self._apply = ring, apply
        self._search = search or search_apart
        self.tuner = OnlineTuner(options, {}, clock.now())

    @property
    def recent(self) -> Ring:
        """Recent workflows."""
        return self._ring

    async def run(self) -> None:
        """Look every few seconds whether there is something to do."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look()
            except Exception:  # tuning must never take the router with it
                _LOG.exception("tuning failed")

    async def look(self) -> None:
        """Do what is due now: judge a change, or search."""
        ring, now = self._ring, self._clock.now()
        if self.tuner.phase is TuningPhase.TRYING:
            newest = list(ring)[-max(self.tuner.fresh(ring.seen), 1) :]
            if self.tuner.judge(measured(newest), ring.seen, now) is Action.REVERT:
                self._turn("revert")
        seen = traffic(list(ring))
        why = self.tuner.due(seen, ring.seen, now)
        if why is None or seen is None or self._coordinator.options.policy not in _TUNED:
            return
        self.tuner.search_started(seen, why, now)
        try:
            recent = await asyncio.to_thread(ring.text)
            files = (recent, fleet_text(list(self._coordinator.engines.values())))
            found = await self._search(files, self._coordinator.options, self._options)
        except SearchFailed as error:
            self.tuner.search_failed(str(error), self._clock.now())
            return
        self._judge(found)

    def _judge(self, found: Mapping[str, Any]) -> None:
        self.tuner.values = dict(found["trials"][0]["values"])
        action = self.tuner.proposed(
            proposal_of(found),
            measured(list(self._ring)),
            self._ring.seen,
            self._clock.now(),
        )
        if action is Action.APPLY:
            self._turn("apply")

    def _turn(self, what: str) -> None:
        values = self.tuner.values
        _LOG.info("tuning %s %s", what, " ".join(f"{k}={v:g}" for k, v in values.items()))
        self._apply(values)


def proposal_of(found: Mapping[str, Any]) -> Proposal:
    """Return the proposal of what ``hexgen-vllm tune --json`` wrote.

    Its gain is that on fresh seeds; without a verdict it is that on the seeds of the search.
    """
    best, verdict = found["proposed"], found.get("verdict")
    if verdict is not None:
        losses, policy = verdict["losses"], verdict["policy"]
        own = policy is None or policy.endswith(TUNED)
        return Proposal(
            best,
            losses[verdict["best"]],
            losses[PRESENT],
            verdict["error"],
            None if own else policy,
            verdict["why"] if verdict["keep"] else None,
        )
    present = found["trials"][0]
    chosen = next(t for t in found["trials"] if t["values"] == best)
    gains = [present["losses"][s] - chosen["losses"][s] for s in present["losses"]]
    spread = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
    loss, present_loss = (fmean(t["losses"].values()) for t in (chosen, present))
    return Proposal(best, loss, present_loss, spread)


def measured(workflows: Sequence[RecentWorkflow]) -> Live:
    """Return the live loss: min deadline @95 %, seconds, over blocks of workflows."""
    return live_loss(
        min_deadline([w.latency_s for w in block], _SHARE, 1.0).seconds
        for block in blocks(workflows)
    )


def fleet_text(engines: Sequence[EngineLoad]) -> str:
    """Return the engines as a fleet file of the simulator.

    Raises:
        SearchFailed: there is none, or one has not been measured yet.
    """
    entries = []
    for engine in engines:
        cost, spec = engine.cost(), engine.spec
        if cost is None:
            raise SearchFailed(f"engine {engine.engine_id} has not been measured yet")
        limits = {
            "max_num_seqs": spec.max_num_seqs,
            "max_num_batched_tokens": spec.max_num_batched_tokens,
            "kv_tokens": spec.kv_tokens,
            "role": None if spec.role is Role.BOTH else spec.role.value,
        }
        known = {name: value for name, value in limits.items() if value is not None}
        entries.append({"name": engine.engine_id, "cost": asdict(cost), **known})
    if not entries:
        raise SearchFailed("there is no engine")
    return json.dumps({"fleet": entries})


async def search_apart(
    files: Files, dispatch: DispatchOptions, options: OnlineOptions
) -> dict[str, Any]:
    """Search in a process of the lowest priority; return what it wrote.

    Raises:
        SearchFailed: it ended without a result, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="hexgen-tune-") as folder:
        paths = [Path(folder) / name for name in ("recent.jsonl", "fleet.yaml", "out.json")]
        for path, text in zip(paths, files, strict=False):
            path.write_text(text, encoding="utf-8")
        await _run(search_command(paths, dispatch, options))
        try:
            return dict(json.loads(paths[2].read_text(encoding="utf-8"))[0])
        except (OSError, ValueError, LookupError):
            raise SearchFailed("the search left no result") from None


def search_command(
    paths: Sequence[Path], dispatch: DispatchOptions, options: OnlineOptions
) -> list[str]:
    """Return the command line of a search: workflows, fleet and result are ``paths``."""
    recent, fleet, out = map(str, paths)
    return [
        *(sys.executable, "-m", "hexgen_vllm.cli", "tune", "--nice", "19", "--live"),
        *("--trace", recent, "--fleet", fleet, "--json", out, "--policy", dispatch.policy),
        *("--budget", str(options.tune_simulations), "--seed", *_SEEDS, "--dispatch"),
        *(f"{k}={v}" for k, v in asdict(dispatch).items() if _is_number(v)),
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


async def _run(words: Sequence[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await asyncio.wait_for(process.communicate(), _SEARCH_LIMIT_S)
    except asyncio.TimeoutError:
        raise SearchFailed("the search took too long") from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        last = said.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise SearchFailed("".join(last) or f"the search ended with {process.returncode}")
