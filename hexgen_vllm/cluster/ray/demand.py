"""What an engine asks of a node, in Ray's words, and whether any node can give it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hexgen_vllm.cluster.ray.keys import Placement

_ACCELERATOR: Final = "accelerator_type:"
_SLIVER: Final = 0.001  # what Ray itself asks for of an accelerator's type
_BUILT_IN: Final = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Node:
    """A machine, or what counts as one, in a Ray cluster.

    Attributes:
        resources: all it has, whether in use or not.
    """

    node_id: str
    address: str
    resources: Mapping[str, float]


def demand(placement: Placement) -> dict[str, float]:
    """Return the resources that one engine takes from its node."""
    asked = {"CPU": placement.num_cpus, "GPU": placement.gpus, **placement.resources}
    asked["memory"] = placement.memory_gib * 2**30
    if placement.accelerator_type is not None:
        asked[f"{_ACCELERATOR}{placement.accelerator_type}"] = _SLIVER
    return {name: float(amount) for name, amount in asked.items() if amount}


def actor_options(placement: Placement) -> dict[str, Any]:
    """Return the same as options of a Ray actor."""
    asked = demand(placement)
    return {
        "num_cpus": asked.pop("CPU", 0.0),
        "num_gpus": asked.pop("GPU", 0.0),
        "memory": int(asked.pop("memory", 0)) or None,
        "resources": asked,
    }


def fits(asked: Mapping[str, float], node: Node) -> bool:
    """Whether an engine could be on ``node``, were that idle."""
    return all(node.resources.get(name, 0.0) >= amount for name, amount in asked.items())


def unmet(placement: Placement, nodes: Iterable[Node]) -> str | None:
    """Return what no node has, as the end of a sentence; ``None`` if one has it all."""
    asked, found = demand(placement), list(nodes)
    if any(fits(asked, node) for node in found):
        return None
    return f"no node of the Ray cluster has {spelled(asked)}; {_offered(found)}"


def spelled(asked: Mapping[str, float]) -> str:
    """Return resources as people write them."""
    return " and ".join(_one(name, amount) for name, amount in asked.items()) or "anything"


def _one(name: str, amount: float) -> str:
    if name.startswith(_ACCELERATOR):
        return f"accelerator {name.removeprefix(_ACCELERATOR)}"
    if name == "memory":
        return f"{amount / 2**30:g} GiB of memory"
    return f"{amount:g} {name}"


def _offered(nodes: list[Node]) -> str:
    kinds = sorted({_of_node(node) for node in nodes})
    return f"there are nodes with {'; '.join(kinds)}" if kinds else "there are no nodes"


def _of_node(node: Node) -> str:
    names = sorted(n for n in node.resources if n not in _BUILT_IN and not n.startswith("node:"))
    plain = {n: node.resources[n] for n in ("CPU", "GPU", *names) if node.resources.get(n)}
    return spelled(plain) if plain else "nothing to give"
