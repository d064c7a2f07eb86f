"""Mixed tenants: workflows of several types interleaved, each type sent by a tenant of its own.

Deadlines may then differ by tenant (``deadline: {tenants: {...}}``, in multiples of the base SLO
of the mix): short interactive loops beside long background jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from hexgen_vllm.sim.map_reduce import map_reduce
from hexgen_vllm.sim.react import react
from hexgen_vllm.sim.text2sql import Text2SqlOptions, text2sql
from hexgen_vllm.sim.workload import WorkflowSpec, generator

SHARES: Final[Mapping[str, float]] = {"analyst": 0.5, "agent": 0.3, "batch": 0.2}


def mixed_tenants(
    count: int, *, seed: int, options: Text2SqlOptions | None = None
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0, in a random order of tenants.

    Tenant ``analyst`` sends text-to-SQL, ``agent`` ReAct loops, ``batch`` map–reduce, at the
    shares of :data:`SHARES`.
    """
    makers: dict[str, Callable[[int], tuple[WorkflowSpec, ...]]] = {
        "analyst": lambda n: text2sql(n, seed=seed, options=options),
        "agent": lambda n: react(n, seed=seed),
        "batch": lambda n: map_reduce(n, seed=seed),
    }
    rng = generator(seed, "tenants")
    order = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=count)
    made = {tenant: iter(makers[tenant](order.count(tenant))) for tenant in SHARES}
    return tuple(replace(next(made[tenant]), tenant=tenant) for tenant in order)
