from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.cluster import ClusterSpec, EngineEntry
from hexgen_vllm.cluster.ray.supervisor import RayCluster
from hexgen_vllm.cluster.ray_options import RayOptions, RayPlacement
from hexgen_vllm.cluster.spec import RouterEntry
from hexgen_vllm.errors import ConfigError
from tests.cluster.test_file import complaint, read


def test_what_a_file_says_of_ray_is_merged_and_checked(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        """
defaults: {model: m, ray: {num_cpus: 4, max_replicas: 3}}
engines:
  - {name: fast, ray: {accelerator-type: H100, min-replicas: 2}}
  - {name: slow, ray: {resources: {old: 1}, max_replicas: 1}}
  - {name: there, url: "http://10.0.0.7:8000"}
ray: {address: auto, autoscale: false, scaling: {horizon_s: 10}}
""",
    )
    fast, slow, there = spec.engines
    assert fast.placement == RayPlacement("H100", num_cpus=4, min_replicas=2, max_replicas=3)
    assert fast.placement.gpus == 1
    assert fast.replicas() == ("fast-0", "fast-1", "fast-2")
    assert slow.placement == RayPlacement(resources={"old": 1}, num_cpus=4, max_replicas=1)
    assert slow.placement.gpus == 0
    assert slow.replicas() == ("slow",)
    assert there.ray == {}
    assert not spec.ray_options.autoscale
    assert spec.ray_options.scaling_options().horizon_s == 10


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ("min_replicas: 3, max_replicas: 2", "max_replicas must be at least min_replicas, which"),
        ("min_replicas: -1", "min_replicas must be at least 0, not -1."),
        ("min_replicas: 0", "max_replicas must be given where min_replicas is 0."),
        ("max_replicas: 0", "max_replicas must be at least 1, not 0."),
        ("max_replicas: two", "max_replicas must be a number, not 'two'."),
        ("max_replicas: 1.5", "max_replicas must be a whole number, not 1.5."),
        ("resources: [fast]", "resources must be a mapping of names to numbers."),
        ("resources: {fast: yes}", "resources must be a mapping of names to numbers"),
        ("resources: {fast: 0}", "resources must be more than 0, and fast is 0."),
        ("num_gpus: many", "num_gpus must be a number, not 'many'."),
        ("accelerator: A100", "unknown ray key 'accelerator'; known are accelerator_type, "),
    ],
)
def test_a_wrong_placement_is_one_sentence_with_its_line(
    tmp_path: Path, keys: str, sentence: str
) -> None:
    text = f"engines:\n  - name: fast\n    model: m\n    ray: {{{keys}}}\n"
    said = complaint(tmp_path, text)
    assert said.startswith("cluster.yaml line ")
    assert sentence in said


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ("autoscale: maybe", "autoscale must be true or false, not 'maybe'."),
        ("scaling: {up: 1}", "unknown scaling key 'up'; known are "),
        ("scaling: {up_load: 2}", "up_load must be at most 1, not 2."),
        ("local_resources: {CPU: -1}", "local_resources must be a mapping of names to numbers"),
        ("cluster: x", "unknown ray key 'cluster'; known are address, "),
    ],
)
def test_wrong_keys_for_all_are_one_sentence(tmp_path: Path, keys: str, sentence: str) -> None:
    said = complaint(tmp_path, f"engines: [{{name: a, model: m}}]\nray: {{{keys}}}\n")
    assert said.startswith("cluster.yaml line 2: ")
    assert sentence in said


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([{"name": "a", "ray": {"max_replicas": 2}}, {"name": "a-1"}], "'a-1' is a replica"),
        (
            [{"name": "a", "port": 8000, "ray": {"max_replicas": 2}}],
            "port does not go with",
        ),
        ([{"name": "a", "model": "", "url": "http://h:1", "ray": {"num_cpus": 1}}], "ray does not"),
    ],
)
def test_what_does_not_go_together_is_said(entries: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ClusterSpec(engines=tuple(EngineEntry(**{"model": "m", **entry}) for entry in entries))


@pytest.mark.parametrize(
    ("engine", "router", "sentence"),
    [
        ({"min_replicas": 0, "max_replicas": 2}, {}, "min_replicas must be above 0 for at least"),
        ({}, {"router-workers": 2}, "router_workers must be 1 with backend ray: "),
    ],
)
def test_what_ray_cannot_keep_is_said_before_it_is_started(
    engine: dict[str, Any], router: dict[str, Any], sentence: str
) -> None:
    entry = EngineEntry(name="a", model="m", ray=engine)
    spec = ClusterSpec(engines=(entry,), router=RouterEntry(options=router))
    with pytest.raises(ConfigError, match=sentence):
        RayCluster(spec)


def test_without_a_word_about_ray_there_is_one_engine_on_one_cpu() -> None:
    entry = EngineEntry(name="a", model="m")
    assert (entry.placement.min_replicas, entry.placement.most) == (1, 1)
    assert (entry.placement.num_cpus, entry.placement.gpus) == (1, 0)
    assert RayOptions().address is None
