"""Keys of the YAML files, from the dataclasses that read them."""

from __future__ import annotations

from collections.abc import Iterator

from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry, RouterEntry
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.scenario import ArrivalOptions, DeadlineOptions, WorkloadOptions
from hexgen_vllm.sim.simulator import SimOptions
from tools.reference.markdown import keys


def sections() -> Iterator[tuple[str, str]]:
    """Yield title and text for each kind of file and part of one."""
    yield (
        "Cluster file",
        "`python -m hexgen_vllm.serve --cluster FILE`: `engines`, a list; `defaults` for them;"
        " `router`, `false` for none; and\n\n" + keys(ClusterSpec, but=("engines", "router")),
    )
    yield (
        "Cluster file, an engine",
        f"In `engines`; in `defaults` for all of them.\n\n{keys(EngineEntry)}",
    )
    beside = "All options of the router may stand beside these, by the names of their flags."
    yield (
        "Cluster file, the router",
        f"In `router`. {beside}\n\n{keys(RouterEntry, but=('options',))}",
    )
    yield (
        "Router file",
        "`hexgen-vllm router --config FILE`: the options of [`hexgen-vllm router`]"
        "(#hexgen-vllm-router) by the names of their flags, without the dashes in front.",
    )
    yield (
        "Scenario file, an engine",
        "`hexgen-vllm sim FILE`: an entry of `fleet`, which also takes `name`, `count` and `cost`."
        f"\n\n{keys(EngineModel, but=('engine_id', 'cost'))}",
    )
    for name, cls in (
        ("workload", WorkloadOptions),
        ("arrivals", ArrivalOptions),
        ("deadline", DeadlineOptions),
        ("simulation", SimOptions),
    ):
        yield f"Scenario file, {name}", f"In `{name}`.\n\n{keys(cls)}"
