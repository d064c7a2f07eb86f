"""What a live run plays, and what comes out of it."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hexgen_vllm.bench.load import HINTS
from hexgen_vllm.bench.text import DEFAULT_VOCAB_SIZE
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, option
from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.report.summary import (
    RunSummary,
    stage_figures,
    summarise,
)
from hexgen_vllm.sim.workloads.text2sql import Text2SqlOptions, text2sql
from hexgen_vllm.sim.workloads.traces.formats import TraceSource
from hexgen_vllm.sim.workloads.traces.played import drawn
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    gamma_bursts,
    generator,
    poisson,
    scaled,
    timed,
)
from hexgen_vllm.wire import plain


@dataclass(frozen=True)
class LiveConfig:
    """One live run.

    Attributes:
        url: base URL of the endpoint, without ``/v1``.
        policy: name of what is measured, for tables and plots.
        seed: seed of workload and arrivals.
        run_id: sets this run's private prompt tokens apart. Random by default, so that no run
            finds another's prompts in a prefix cache; the same id repeats a run token for token.
    """

    url: str = "http://127.0.0.1:8000"
    policy: str = "unnamed"
    seed: int = 0
    run_id: str = option("", "salt of private prompt tokens; empty is a random one")
    workload: str = option(
        "text2sql", "generated workload; a trace replaces it", choices=("text2sql",)
    )
    trace: str | None = option(
        None, "file or folder of recorded workflows, drawn from with the seed"
    )
    workflows: int = option(100, "workflows that count", least=1, most=1_000_000)
    rate: float = option(1.0, "mean arrivals, workflows/s", least=1e-6, most=1e6)
    burstiness: float = option(
        1.0, "variation of arrival gaps: 1 is Poisson, more is bursts", least=0.01, most=100.0
    )
    deadline_s: float = option(30.0, "deadline of a workflow, seconds from its arrival", least=1e-3)
    base_s: float | None = option(
        None,
        "base SLO that deadlines are multiples of, seconds; none is the deadline",
        least=1e-3,
    )
    length_scale: float = option(1.0, "factor on all lengths", least=1e-4, most=100.0)
    databases: int = option(10, "databases of the generated workload", least=1, most=10_000)
    retries: str = option(
        "skewed", "revise rounds of the generated workload", choices=("skewed", "uniform", "mixed")
    )
    warmup: int = option(0, "workflows played before those that count", least=0, most=1_000_000)
    hints: str = option("none", "what the client tells of its future", choices=HINTS)
    model: str | None = option(None, "served model name; none is the first one")
    stream: bool = option(True, "stream answers, which gives time to first token")
    chat: bool = option(False, "send text to chat completions instead of token ids to completions")
    agentic_context: bool = option(
        False, "tell of workflows in the body, too, as vllm-router reads it"
    )
    vocab_size: int = option(DEFAULT_VOCAB_SIZE, "token ids are below this", least=32, most=10**7)
    api_key: str | None = option(None, "bearer token for the endpoint")
    timeout_s: float = option(600.0, "longest time for one call, seconds", least=1e-3)
    drain_s: float = option(
        600.0, "wait after the last arrival; what is open then is lost, seconds", least=0.0
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url must start with http:// or https://, not {self.url!r}.")
        object.__setattr__(self, "run_id", self.run_id or uuid.uuid4().hex[:12])
        object.__setattr__(self, "url", self.url.rstrip("/").removesuffix("/v1"))

    def specs(self) -> tuple[WorkflowSpec, ...]:
        """Return the workflows to play, those of the warm-up first; the seed determines them.

        Raises:
            ConfigError: the trace cannot be read.
        """
        count = self.warmup + self.workflows
        if self.trace is not None:
            found = drawn(TraceSource(Path(self.trace)), count, self.seed)
        else:
            options = Text2SqlOptions(databases=self.databases, retries=self.retries)
            found = text2sql(count, seed=self.seed, options=options)
        rng = generator(self.seed, "arrivals")
        if self.burstiness == 1:
            arrivals = poisson(count, self.rate, rng)
        else:
            arrivals = gamma_bursts(count, self.rate, self.burstiness, rng)
        return timed((scaled(spec, self.length_scale) for spec in found), arrivals)


@dataclass(frozen=True)
class LiveResult:
    """What came out of a run; records of the warm-up are not in it."""

    config: LiveConfig
    workflows: tuple[WorkflowRecord, ...]
    calls: tuple[CallRecord, ...]

    @property
    def summary(self) -> RunSummary:
        """The figures of the run."""
        config = self.config
        return summarise(
            self.workflows,
            self.calls,
            policy=config.policy,
            seed=config.seed,
            rate=config.rate,
            base_s=config.base_s or config.deadline_s,
        )

    def row(self) -> dict[str, Any]:
        """Return the result as one JSON object; ``null`` stands for no value and for never.

        ``latencies_s`` and ``arrivals_s`` have one entry for each workflow, in order of arrival.
        """
        config = self.config
        messages = Counter(w.error for w in self.workflows if w.error is not None)
        engines = Counter(c.engine for c in self.calls if c.engine is not None)
        row = {
            **asdict(self.summary),
            "deadline_s": config.deadline_s,
            "base_s": config.base_s or config.deadline_s,
            "length_scale": config.length_scale,
            "workload": config.trace or f"{config.workload}/{config.retries}",
            "databases": config.databases,
            "burstiness": config.burstiness,
            "warmup": config.warmup,
            "hints": config.hints,
            "stream": config.stream,
            "run_id": config.run_id,
            "latencies_s": [w.latency_s for w in self.workflows],
            "arrivals_s": [w.arrived_s for w in self.workflows],
            "error_messages": dict(messages.most_common(20)),
            "calls": {
                "stages": stage_figures(self.calls),
                "engines": dict(sorted(engines.items())),
            },
        }
        return {**plain(row, 6)}
