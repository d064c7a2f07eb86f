from __future__ import annotations

from hexgen_vllm.cluster.ray import nodes
from hexgen_vllm.cluster.ray.nodes import Node, listening
from hexgen_vllm.cluster.ray_options import RayPlacement

HEAD = Node("h", "10.0.0.1", {"CPU": 8.0, "node:10.0.0.1": 1.0, "memory": 8 * 2**30})
GPUS = Node("g", "10.0.0.2", {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0})


def test_an_engine_asks_for_what_its_entry_names() -> None:
    placement = RayPlacement("A100", {"rack": 0.5}, num_gpus=2, num_cpus=3, memory_gib=4)
    assert nodes.demand(placement) == {
        "CPU": 3,
        "GPU": 2,
        "rack": 0.5,
        "memory": 4 * 2**30,
        "accelerator_type:A100": 0.001,
    }
    assert nodes.actor_options(placement) == {
        "num_cpus": 3,
        "num_gpus": 2,
        "memory": 4 * 2**30,
        "resources": {"rack": 0.5, "accelerator_type:A100": 0.001},
    }


def test_a_node_that_could_hold_an_engine_is_enough() -> None:
    assert nodes.unmet(RayPlacement("A100"), [HEAD, GPUS]) is None
    assert nodes.unmet(RayPlacement(memory_gib=8), [HEAD, GPUS]) is None


def test_what_no_node_has_is_said_beside_what_there_is() -> None:
    assert nodes.unmet(RayPlacement("H100"), [HEAD, GPUS]) == (
        "no node of the Ray cluster has 1 CPU and 1 GPU and accelerator H100; there are nodes with "
        "8 CPU; 8 CPU and 2 GPU and accelerator A100"
    )
    assert nodes.unmet(RayPlacement("A100", num_gpus=4), [GPUS]) is not None
    assert nodes.unmet(RayPlacement(resources={"fast": 1}), []) == (
        "no node of the Ray cluster has 1 CPU and 1 fast; there are no nodes"
    )


def test_an_engine_listens_where_others_reach_it() -> None:
    assert listening("127.0.0.1", "10.0.0.2") == ("10.0.0.2", "10.0.0.2")
    assert listening("0.0.0.0", "10.0.0.2") == ("0.0.0.0", "10.0.0.2")
    assert listening("192.168.1.2", "10.0.0.2") == ("192.168.1.2", "192.168.1.2")
