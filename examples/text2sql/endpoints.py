"""Where questions go: endpoints that run already, or engines and a router started here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from examples.text2sql.options import Options
from hexgen_vllm.cluster import Cluster, ClusterSpec
from hexgen_vllm.demo import DEVICES, FLEETS, DemoOptions, engine_entry, router_entry
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.report import say
from hexgen_vllm.text2sql.session import AskedEndpoint, named

LOCAL = {"stock": "round_robin", "slack": "slack"}
"""Fleets of ``--compare`` and the router's placement before them, ours last."""
_SLOWER = 2.0
"""Than the devices of the other demo: grammars and queries are work for this machine, too, which
should not decide who is on time."""
_WHOLE_PROMPTS = "--max-num-batched-tokens=8192"
"""More than all prompts of a step together, so that none is split: vLLM 0.32 on a CPU cannot step
back the random generator of a call with a seed, and ends."""


async def endpoints(options: Options) -> AsyncGenerator[AskedEndpoint, None]:
    """Yield the endpoints in turn; those started here run until the next one is asked for.

    Raises:
        ConfigError: the model to serve is no folder.
        ProcessFailed: a server that was to be started here did not start.
    """
    if not options.compare:
        async for endpoint in named(options):
            yield endpoint
        return
    if not Path(options.model or "").is_dir():
        raise ConfigError(f"model must be a folder with compare, and {options.model} is none.")
    for fleet, placement in LOCAL.items():
        say(f"{fleet}: starting two engines and a router")
        async with Cluster(local_cluster(options, fleet, placement)) as cluster:
            url = f"{cluster.router_url}/v1"
            yield AskedEndpoint(fleet, url)
            yield AskedEndpoint(f"{fleet} + grammar", url, constrain=True)


def local_cluster(options: Options, fleet: str, placement: str) -> ClusterSpec:
    """Return two engines that emulate devices of 3 to 1 in speed, and their router."""
    demo = DemoOptions(model=options.model or "", deadline_s=options.deadline_s)
    return ClusterSpec(
        engines=tuple(
            replace(entry, args=(*entry.args, _WHOLE_PROMPTS))
            for entry in (engine_entry(demo, FLEETS[fleet], device, _SLOWER) for device in DEVICES)
        ),
        router=router_entry(demo, placement),
        log_dir=str(Path(options.out) / "logs" / fleet),
        start_timeout_s=300.0,
    )
