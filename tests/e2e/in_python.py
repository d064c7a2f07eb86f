"""A program of way c: ``vllm.LLM`` with our scheduler, one sequence at a time.

    in_python.py MODEL class|policy [HEXGEN_OPTION=VALUE]

Prints as JSON the order in which calls with 90000, 3000 and 30000 seconds left end; all come
while another runs, and the order that the engine says it keeps.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def stats_of(client: Any) -> Any:
    """Return the telemetry of an engine in a process of its own or in this one."""
    if hasattr(client, "call_utility"):
        return client.call_utility("hexgen_stats")
    return client.engine_core.hexgen_stats()


def main() -> int:
    """Run the calls; return the exit code."""
    from vllm import LLM, SamplingParams

    from hexgen_vllm import UrgencyScheduler, with_deadline

    model, way, *options = sys.argv[1:]
    asked: dict[str, Any] = {"scheduler_cls": UrgencyScheduler}
    if way == "policy":
        asked = {"scheduling_policy": "urgency"}
    if options:
        asked["additional_config"] = {"hexgen": dict(option.split("=") for option in options)}
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=1,
        block_size=32,
        num_gpu_blocks_override=160,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        distributed_executor_backend="uni",
        **asked,
    )
    engine = llm.llm_engine
    engine.add_request("first", "SELECT", SamplingParams(max_tokens=2000, ignore_eos=True))
    while not engine.step():
        pass  # until it runs
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for seconds in (90000, 3000, 30000):
        engine.add_request(f"{seconds}", "SELECT", with_deadline(params, seconds))
    ended: list[str] = []
    while engine.has_unfinished_requests():
        ended += [output.request_id.split("-")[0] for output in engine.step() if output.finished]
    print(json.dumps({"ended": ended, "order": stats_of(engine.engine_core)["order"]}))
    return 0
