"""What a cluster file says about Ray, for each engine and for all; needs no ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, from_mapping, option
from hexgen_vllm.policy.scaling import ScalingOptions


@dataclass(frozen=True)
class RayPlacement:
    """Where Ray puts the engines of one entry, and how many.

    Attributes:
        num_gpus: one if an accelerator type is named, else none, when not given.
        max_replicas: as many as ``min_replicas`` when not given.
    """

    accelerator_type: str | None = option(None, "accelerator of the node, by Ray's name for it")
    resources: Mapping[str, float] = option({}, "custom resources of the node that one engine uses")
    num_gpus: float | None = option(None, "GPUs that one engine uses", least=0.0)
    num_cpus: float = option(1.0, "CPUs that one engine uses", least=0.0)
    memory_gib: float = option(0.0, "memory that one engine uses, GiB; 0 says nothing", least=0.0)
    min_replicas: int = option(1, "fewest engines", least=0)
    max_replicas: int | None = option(None, "most engines", least=1)

    def __post_init__(self) -> None:
        check(self)
        for name, amount in _numbers("resources", self.resources):
            if not amount > 0:
                raise ConfigError(f"resources must be more than 0, and {name} is {amount:g}.")

    def check_whole(self) -> None:
        """Check what only all fields together can tell.

        Raises:
            ConfigError: the bounds do not fit together.
        """
        if self.max_replicas is None and not self.min_replicas:
            raise ConfigError("max_replicas must be given where min_replicas is 0.")
        if self.most < self.min_replicas:
            raise ConfigError(
                f"max_replicas must be at least min_replicas, which is {self.min_replicas}, not "
                f"{self.most}."
            )

    @property
    def most(self) -> int:
        """Most engines there may be."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas

    @property
    def gpus(self) -> float:
        """GPUs that one engine uses."""
        if self.num_gpus is None:
            return 0.0 if self.accelerator_type is None else 1.0
        return self.num_gpus


@dataclass(frozen=True)
class RayOptions:
    """What goes for all engines.

    Attributes:
        local_resources: ``CPU`` and ``GPU`` among them; what is not named Ray finds out.
        scaling: options of :class:`hexgen_vllm.policy.scaling.ScalingOptions`.
    """

    address: str | None = option(None, "host:port of a Ray cluster, or auto; none starts one here")
    local_resources: Mapping[str, float] = option(
        {}, "resources that this machine has, for a cluster that is started here"
    )
    wait_for_nodes_s: float = option(
        0.0, "longest wait at the start for nodes that can hold the engines, seconds", least=0.0
    )
    autoscale: bool = option(True, "add and remove engines between their bounds")
    interval_s: float = option(2.0, "time between two decisions to do so, seconds", least=0.1)
    scaling: Mapping[str, Any] = option({}, "when engines are added and removed")

    def __post_init__(self) -> None:
        check(self)
        list(_numbers("local_resources", self.local_resources))
        self.scaling_options()

    def scaling_options(self) -> ScalingOptions:
        """Return the options of scaling."""
        if not isinstance(self.scaling, Mapping):
            raise ConfigError("scaling must be a mapping.")
        return from_mapping(ScalingOptions, self.scaling, where="scaling key")


def _numbers(name: str, values: object) -> list[tuple[str, float]]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be a mapping of names to numbers.")
    for value in values.values():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a mapping of names to numbers, not to {value!r}.")
    return [(str(key), float(value)) for key, value in values.items()]
