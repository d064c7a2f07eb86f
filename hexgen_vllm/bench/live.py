"""``hexgen-vllm bench live``: plays workflows against real OpenAI endpoints.

As a library: ``result = await run(LiveConfig(url, policy="slack", rate=2.0))``, then
``result.summary`` and ``result.row()``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import aiohttp
import uvloop

from hexgen_vllm import option as options
from hexgen_vllm.bench.load import LoadRun, Progress
from hexgen_vllm.bench.load_client import LoadClient, Model, find_model
from hexgen_vllm.bench.scenario import LiveConfig, LiveResult
from hexgen_vllm.bench.text import PromptSource
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results
from hexgen_vllm.report.plot import check_plot, draw_attainment
from hexgen_vllm.report.table import render
from hexgen_vllm.sim.workloads.workload import WorkflowSpec

Report = Callable[[LiveConfig, Progress], None]
_READ_BUFFER_BYTES: Final = 2**20  # a line of a stream must fit


async def run(config: LiveConfig, report: Report | None = None) -> LiveResult:
    """Play one run to its end.

    Args:
        config: what to play.
        report: called about once a second with the progress so far, and once at the end.

    Raises:
        ConfigError: the endpoint cannot be used, the trace cannot be read, or a call is longer
            than the model's context.
    """
    specs = config.specs()
    clock = SystemClock()
    async with _session(config) as session:
        model = await find_model(session, config.url, config.model)
        _check_lengths(config, specs, model)
        prompts = PromptSource(config.vocab_size, salt=config.run_id)
        endpoint = LoadClient(
            session, config.url, model.name, prompts, clock,
            config.stream, config.chat, config.agentic_context,
        )  # fmt: skip
        load = LoadRun(endpoint, clock, config.deadline_s, config.hints, config.drain_s)
        async with _reporting(config, load, report):
            workflows = await load.play(specs)
    counted = {spec.workflow_id for spec in specs[config.warmup :]}
    return LiveResult(
        config,
        tuple(record for record in workflows if record.workflow_id in counted),
        tuple(call for call in load.calls if call.workflow_id in counted),
    )


@asynccontextmanager
async def _session(config: LiveConfig) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    async with aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=config.timeout_s),
        read_bufsize=_READ_BUFFER_BYTES,
    ) as session:
        yield session


def _check_lengths(config: LiveConfig, specs: Sequence[WorkflowSpec], model: Model) -> None:
    longest = max(c.prompt_tokens + c.output_tokens for spec in specs for c in spec.calls())
    if model.max_tokens is not None and longest > model.max_tokens:
        fitting = config.length_scale * model.max_tokens / longest
        raise ConfigError(
            f"a call of {longest} tokens does not fit into the {model.max_tokens} of model "
            f"{model.name}; a length scale of {math.floor(fitting * 1e4) / 1e4:g} would fit."
        )


@asynccontextmanager
async def _reporting(
    config: LiveConfig, load: LoadRun, report: Report | None
) -> AsyncIterator[None]:
    if report is None:
        yield
        return

    async def repeat() -> None:
        while True:
            await asyncio.sleep(1.0)
            report(config, load.progress)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        report(config, load.progress)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench live``."""
    add = parser.add_argument
    again = "repeat both to compare endpoints"
    add(
        "--url",
        action="append",
        required=True,
        dest="urls",
        metavar="URL",
        help=f"endpoint; {again}",
    )
    add(
        "--policy-name", action="append", dest="policies", metavar="NAME", help=f"its name; {again}"
    )
    add("--seed", type=int, nargs="+", default=[0], dest="seeds", help="one run each (default: 0)")
    options.add_arguments(parser, LiveConfig)
    add("--deadline", type=float, dest="deadline_s", metavar="S", help="same as --deadline-s")
    add("--json", type=Path, metavar="OUT", help="write results here")
    add("--append", action="store_true", help="keep the results that the --json file has already")
    add("--plot", type=Path, metavar="OUT.png", help="draw attainment here")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 when a run finished no workflow at all.

    Raises:
        ConfigError: an option, a file or an endpoint cannot be used.
    """
    configs = _configs(args)
    before = results.read(args.json) if args.append and args.json else []
    for path in (args.json, args.plot):
        results.check_writable(path)
    if args.plot:
        check_plot(args.plot)
    rows = list(before)
    for config in configs:
        line = _ProgressLine()
        rows.append(uvloop.run(run(config, line)).row())
        line.end()
        if args.json:
            results.write(args.json, rows)
    print(render(rows))
    if args.plot:
        draw_attainment(rows, args.plot)
    return 0 if all(row["p50_s"] is not None for row in rows[len(before) :]) else 1


def _configs(args: argparse.Namespace) -> list[LiveConfig]:
    """Return the runs to make; endpoints alternate, so that drift affects them all alike."""
    policies = args.policies or [url.partition("//")[2] for url in args.urls]
    if len(policies) != len(args.urls):
        raise ConfigError(
            f"{len(args.urls)} --url and {len(policies)} --policy-name do not make pairs."
        )
    given = options.given(args, LiveConfig)
    return [
        LiveConfig(url=url, policy=policy, seed=seed, **given)
        for seed in args.seeds
        for url, policy in zip(args.urls, policies, strict=True)
    ]


class _ProgressLine:
    """Rewrites one line on a terminal; elsewhere writes a line for every tenth that has ended."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, config: LiveConfig, progress: Progress) -> None:
        text = (
            f"{config.policy} seed {config.seed}: {progress.started}/{progress.workflows} started, "
            f"{progress.open} open, {progress.finished} finished, {progress.late} late, "
            f"{progress.failed} failed"
        )
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            return
        tenths = 10 * (progress.finished + progress.failed) // progress.workflows
        if tenths > self._tenths:
            self._tenths = tenths
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if sys.stderr.isatty():
            print(file=sys.stderr)
