"""The options of policies and of engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import RENAMED, Tuned, check, no_choice, option


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine's scheduler (``additional_config["hexgen"]``, ``--hexgen-…``)."""

    order: str = option(
        "due",
        "order of calls with a deadline: due (deadline less what comes after the call), slack, "
        "paper (its urgency), edf or fcfs",
        choices=("due", "slack", "paper", "edf", "fcfs", "priority"),
        renamed=RENAMED,
    )
    demote_late: bool = option(
        True, "due: a call that cannot be on time any more comes after those that can"
    )
    pace: bool = option(
        True, "leave calls without deadline out of steps that would be too slow for the others"
    )
    interactive_share: float = option(
        0.95,
        "most that calls with a deadline may take of the turns and places of those without",
        least=0.0,
        most=1.0,
    )
    learned_file: str | None = option(
        None,
        "file that keeps what the engine has learned of lengths and of what follows calls across "
        "restarts; engine processes after the first add their data-parallel rank to its name",
    )
    default_deadline_s: float | None = option(
        None,
        "deadline of calls that bring none, seconds from their arrival; without it they have none "
        "and are served, by arrival, in what calls with deadlines leave",
        least=1e-3,
    )
    displace: bool = option(True, "let an urgent waiting call preempt running ones")
    displace_slack_s: float = option(
        2.0,
        "displace only for a call whose slack is below this, seconds",
        least=0.0,
        tuned=Tuned(0.2, 20.0, ("slack",), log=True),
    )
    displace_late_s: float = option(
        5.0, "nor for a call whose latest start passed longer ago than this, seconds", least=0.0
    )
    displace_gap_s: float = option(
        0.5,
        "a victim has at least this much more slack than the urgent call, seconds",
        least=0.0,
        tuned=Tuned(0.1, 20.0, ("slack",), log=True),
    )
    max_displacements: int = option(3, "times one call may be displaced", least=0)
    protect_last_tokens: int = option(
        16, "never displace a call with this few output tokens left", least=0
    )
    host_kv_gib: float = option(
        0.0, "host memory for the KV of preempted calls, GiB per engine; 0 is none", least=0.0
    )
    keep_kv: str = option(
        "auto",
        "with host_kv_gib: keep the KV of a preempted call when copying beats computing it again",
        choices=("auto", "always", "never"),
    )
    keep_ended_kv: bool = option(
        True, "with host_kv_gib: keep the KV of ended calls, too, if their workflow may come back"
    )
    evict_finished_first: bool = option(
        True,
        "evict KV that only finished workflows have used from the prefix cache before all other; a "
        "workflow is finished when its last call, named so, has ended",
    )
    max_priority: int | None = option(
        None,
        "highest priority of clients that counts, higher is sooner; for engines that clients reach "
        "themselves",
    )
    min_deadline_s: float = option(
        0.0, "shortest deadline of clients that counts, seconds; as max_priority", least=0.0
    )
    background_max_wait_s: float = option(
        120.0, "after this long a background call is ordered among the others, seconds", least=0.0
    )
    stats_port: int = option(
        0,
        "port on which the engine process itself gives its telemetry, plus its data-parallel rank; "
        "0 is none, but with vLLM's Rust server, which has none to give, that of --port + 10000",
        least=0,
        most=65535,
    )
    stats_host: str = option("127.0.0.1", "address for that port")
    batch_dir: str | None = option(
        None, "folder of files and batches (/v1/files, /v1/batches) of one engine; off by default"
    )
    prefill_tokens_per_s: float = option(
        5000.0, "prefill rate assumed until measured, tokens/s", least=1e-3
    )
    decode_tokens_per_s: float = option(
        50.0, "decode rate of one call assumed until measured, tokens/s", least=1e-3
    )

    def __post_init__(self) -> None:
        check(self)


PLACEMENT_NAMES: Final = (
    "slack",
    "paper",
    "round_robin",
    "least_outstanding",
    "earliest_finish",
    "weighted_round_robin",
    "weighted_least",
    "power_of_two",
    "sticky",
    "wlcaff",
    "llm_d",
    "cache_aware",
    "dynamo",
)


def is_policy_file(name: str) -> bool:
    """Return whether ``name`` has the form ``FILE.py:Class``, or could have: a class is missing."""
    return ".py:" in name or name.endswith(".py")


def check_policy_name(name: str, names: tuple[str, ...] = PLACEMENT_NAMES) -> None:
    """Check that a policy is one of ``names`` or in a file, which is not looked at here.

    Raises:
        ConfigError: it is neither.
    """
    if name not in names and not is_policy_file(name):
        raise no_choice("policy", name, names, " or FILE.py:Class")


@dataclass(frozen=True)
class DispatchOptions:
    """Options of placement (the router and the simulator)."""

    policy: str = option(
        "slack",
        "how calls are placed: slack (ours), paper (HEXGEN-TEXT2SQL's), another of "
        "docs/policies.md, or FILE.py:Class",
        renamed=RENAMED,
    )
    alpha: float = option(
        0.2,
        "paper: weight of device speed against load",
        least=0.0,
        most=1.0,
        tuned=Tuned(0.0, 1.0, ("paper",)),
    )
    paper_form: str = option(
        "code",
        "paper: score of the public code or of the article",
        choices=("code", "paper"),
        was="hexgen_form",
    )
    beta: float = option(1.0, "paper, form paper: seconds squared that scale 1/t_queue", least=0.0)
    externality: float = option(
        1.0,
        "slack: weight of the time a call adds to others on the engine",
        least=0.0,
        tuned=Tuned(0.0, 2.0, ("slack",)),
    )
    stretch: float = option(
        3.0,
        "slack: power by which workflows weigh that are long against their deadline; 0 is equal",
        least=0.0,
        most=10.0,
        tuned=Tuned(0.0, 6.0, ("slack",)),
    )
    priority_by: str = option(
        "deadline",
        "what stock engines with priorities are told: the deadline, the workflow's work so far "
        "(PLAS) or its work left (SRPT); least first",
        choices=("deadline", "attained", "remaining"),
    )
    affinity_tokens: float = option(
        200.0,
        "wlcaff: uncached prompt tokens that count as one call",
        least=1.0,
        tuned=Tuned(50.0, 2000.0, ("wlcaff",), log=True),
    )
    prefix_affinity: bool = option(
        True, "slack: count the prefill that an engine's prefix cache saves"
    )
    hold_depth: int = option(
        2,
        "slack: calls an engine gets beyond its sequence slots; -1 places at once",
        least=-1,
        tuned=Tuned(0, 16, ("slack",)),
    )
    kv_transfer_rate: float = option(
        50_000.0,
        "tokens per second of KV that reach an engine of role decode, until it has shown it",
        least=1.0,
    )
    default_deadline_s: float = option(
        60.0, "deadline of workflows that bring none, seconds", least=1e-3
    )
    default_output_tokens: int = option(
        256, "output length assumed of a stage never seen, tokens", least=1
    )
    length_quantile: float = option(
        0.5,
        "quantile of output length that routing expects",
        least=0.0,
        most=1.0,
        tuned=Tuned(0.3, 0.95, ("slack",)),
    )
    slack_quantile: float = option(
        0.8,
        "quantile of the remaining path that slack allows for",
        least=0.0,
        most=1.0,
        tuned=Tuned(0.3, 0.95, ("slack", "paper")),
    )
    overload: str = option(
        "off",
        "protect, with policy slack: new workflows that would be late are refused, others that "
        "will be come last",
        choices=("off", "protect"),
    )
    hopeless_quantile: float = option(
        0.5,
        "protect: quantile of length and path of the hopeless test, where as much is left as new "
        "workflows have; in proportion where less is",
        least=0.0,
        most=1.0,
    )
    hopeless_pace: float = option(
        0.7,
        "protect: hopeless test: time over that on the best engine at its present pace; 0 gives up "
        "only what is late",
        least=0.0,
    )
    entry_margin: float = option(
        2.0,
        "protect: a new workflow needs its predicted time times this when engines are full, and "
        "less, down to once, the emptier they are; 0 takes all",
        least=0.0,
    )
    reject_at_entry: bool = option(
        True, "protect: refuse new workflows that would be late; no demotes them instead"
    )
    background_share: float = option(
        0.05,
        "protect: share of placements for the call demoted longest, and of calls on the engines "
        "that may be demoted ones",
        least=0.0,
        most=1.0,
    )
    max_workflows: int = option(
        0, "workflows open at once; a new one beyond is refused, 0 is no limit", least=0
    )
    max_held_calls: int = option(
        0, "calls that may wait for room on an engine, 0 is no limit", least=0
    )
    max_held_tokens: int = option(
        0, "prompt and output tokens of calls that may wait, 0 is no limit", least=0
    )
    held_timeout_s: float = option(
        0.0, "a call that waited this long is refused, seconds; 0 is never", least=0.0
    )
    fair_window_tokens: int = option(
        -1,
        "tokens that a tenant may get beyond its share until calls of others go first; -1: that "
        "of 8 average calls, and only before calls that would become late; 0 is off",
        least=-1,
    )
    tenant_weights: Mapping[str, float] = option({}, "weights of tenants, 1 for others")

    def __post_init__(self) -> None:
        check(self)
        check_policy_name(self.policy)
        for tenant, weight in self.tenant_weights.items():
            if type(weight) not in (int, float) or not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"tenant_weights of {tenant} must be a number above 0.")
