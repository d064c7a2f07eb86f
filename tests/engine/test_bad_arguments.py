"""Bad arguments of engine, kernels and client raise our own error, with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.client import Workflow, with_deadline
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.server import arguments
from hexgen_vllm.errors import HexgenError

Mistake = tuple[str, Callable[[], Any]]


def target(**values: Any) -> SimpleNamespace:
    """Return parsed arguments of vLLM."""
    usual = {"scheduling_policy": "urgency", "scheduler_cls": None, "additional_config": {}}
    return SimpleNamespace(**{**usual, **values})


def config(**values: Any) -> SimpleNamespace:
    """Return vLLM's configuration of an engine whose KV cache can be saved."""
    return SimpleNamespace(additional_config=values)


def entered_twice() -> None:
    workflow = Workflow(SimpleNamespace())
    with workflow:
        pass
    with workflow:
        pass


def swap(parallel: str = "", kind: str = "") -> None:
    """Ask for host memory for the KV of an engine with such a parallelism, or kind of layers."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from hexgen_vllm.engine.swap import setup

    sizes = {f"{parallel}_parallel_size": 2} if parallel else {}
    spec = object.__new__(FullAttentionSpec) if not kind else SimpleNamespace()
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
    cache = SimpleNamespace(kv_cache_groups=[group], needs_kv_cache_zeroing=bool(kind))
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1, **sizes))
    setup.pool_size(vllm_config, cache, 1.0)


def of_engine(module: str, name: str, *args: Any) -> Callable[[], Any]:
    """Return a call of a function that cannot be imported without vLLM."""

    def call() -> Any:
        found = __import__(f"hexgen_vllm.{module}", fromlist=[name])
        made = getattr(found, name)(*args)
        if isinstance(made, HexgenError):
            raise made
        return made

    return call


def names_another_connector() -> None:
    from hexgen_vllm.engine.swap import setup

    other = SimpleNamespace(kv_transfer_config={"kv_connector": "Other"})
    setup.choose_connector(other, {"host_kv_gib": 1})


PLAIN: tuple[Mistake, ...] = (
    ("--scheduling-policy … and --scheduler-cls … exclude each other.",
     lambda: arguments.resolve(target(scheduler_cls="vllm.Other"))),
    ("additional_config must be a mapping to carry the hexgen options.",
     lambda: arguments.resolve(target(additional_config=1))),
    ("additional_config.hexgen must be a mapping, not ….",
     lambda: arguments.resolve(target(additional_config={"hexgen": 1}))),
    ("… needs --scheduling-policy ….",
     lambda: arguments.resolve(target(scheduling_policy="fcfs", hexgen_order="edf"))),
    ("unknown option …; known are ….", lambda: arguments._refuse_unknown(["--hexgen-ordr=edf"])),
    ("deadline_s must be a number of seconds above 0 and up to 1e9, not ….",
     lambda: Workflow(None, deadline_s=0)),
    ("deadline_s must be a number of seconds above 0 and up to 1e9, not ….",
     lambda: with_deadline(SimpleNamespace(extra_args=None), deadline_s=0)),
    ("late must be one of …, not ….", lambda: Workflow(None, late="maybe")),
    ("a Workflow can be entered only once.", entered_twice),
    ("a Workflow must be entered (with, async with) before it is used.",
     lambda: Workflow(None).id),
)  # fmt: skip
ENGINE: tuple[Mistake, ...] = (
    ("hexgen_vllm supports vLLM …, but vLLM … is installed.",
     of_engine("engine.compat", "require_supported", "0.27.0")),
    ("vLLM … has no … as hexgen_vllm needs it; supported is vLLM ….",
     of_engine("engine.compat", "lacking", "Scheduler.schedule")),
    ("additional_config.hexgen must be an object, not ….",
     of_engine("engine.scheduler", "options_of", config(hexgen=1))),
    ("additional_config.hexgen_pace must be an object, not ….",
     of_engine("testing.pace", "pace_of", config(hexgen_pace=1))),
    ("… cannot be used beside another KV connector (…), because nothing puts the copies of the two "
     "in order: take the other one out, or …, and have --kv-offloading-size of vLLM or a "
     "MultiConnector keep KV in host memory.", names_another_connector),
    ("… cannot be used with … parallelism.", lambda: swap(parallel="pipeline")),
    ("… needs a model whose layers all have full attention; for one whose other layers have "
     "windows, --disable-hybrid-kv-cache-manager makes them so.", lambda: swap(kind="sliding")),
    ('… needs the plugin of an installed hexgen_vllm (is VLLM_PLUGINS without "hexgen"?) or '
     "--kv-transfer-config with kv_connector …, kv_connector_module_path … and kv_role "
     "kv_producer.",
     of_engine("engine.swap.setup", "planner_of", None, EngineOptions(host_kv_gib=1))),
    ("host_kv_gib needs --scheduler-cls …, or a vLLM that `hexgen-vllm patch apply` has patched.",
     of_engine("engine.swap.connector", "require_teller",
               SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls="vllm.Other")))),
    ("kernel: … is none of ….", of_engine("kernels", "_choose", "cpu", "nonsense")),
    ("kernel …: ….", of_engine("kernels", "_choose", "cpu", "cuda")),
    ("hidden must be a multiple of …, not ….", of_engine("testing.tiny_model", "TinySpec", 3)),
    ("layers must be at least 1, not ….", of_engine("testing.tiny_model", "TinySpec", 64, 0)),
)  # fmt: skip


def check(make: Callable[[], Any]) -> None:
    with pytest.raises(HexgenError) as raised:
        make()
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("make", [m for _, m in PLAIN], ids=[what for what, _ in PLAIN])
def test_a_mistake_without_an_engine(make: Callable[[], Any]) -> None:
    check(make)


@pytest.mark.engine
@pytest.mark.parametrize("make", [m for _, m in ENGINE], ids=[what for what, _ in ENGINE])
def test_a_mistake_of_an_engine(make: Callable[[], Any]) -> None:
    check(make)
