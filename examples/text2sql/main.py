"""Ask an agent that writes SQL questions about three databases, and report its answers."""

from __future__ import annotations

import argparse
import asyncio
import random
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from examples.text2sql import report
from examples.text2sql.agent import Agent
from examples.text2sql.calls import Sampling
from examples.text2sql.databases import build_all
from examples.text2sql.endpoints import Endpoint, endpoints
from examples.text2sql.options import Options
from examples.text2sql.questions import FILE, Question, drawn, load
from examples.text2sql.report import say
from examples.text2sql.users import Users, Visit
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.cluster import ProcessFailed
from hexgen_vllm.config import add_arguments, given
from hexgen_vllm.errors import ConfigError, HexgenError


async def run(options: Options) -> list[dict[str, Any]]:
    """Ask every endpoint the same questions; write and return the figures, one for each.

    Raises:
        ConfigError: an endpoint or the questions cannot be used, or ``out`` cannot be written.
        ProcessFailed: a server that was to be started here did not start.
    """
    out = Path(options.out)
    file = FILE if options.questions is None else Path(options.questions)
    known = load(_databases(out / "databases"), file)
    count = options.users or len(known)
    rng = random.Random(f"questions/{options.seed}")
    # The warm-up ends with its own draw: those that count begin with each question once.
    asked = drawn(known, options.warmup, rng) + drawn(known, count, rng)
    summaries: list[dict[str, Any]] = []
    async with aclosing(endpoints(options)) as found:
        async for endpoint in found:
            visits = await _visits(options, endpoint, asked)
            counted = visits[options.warmup :]
            summaries.append(report.summary(endpoint.name, counted, options.rate))
            report.write(out / "results.json", summaries, counted)
    return summaries


def _databases(folder: Path) -> Mapping[str, Path]:
    try:
        return build_all(folder)
    except (OSError, sqlite3.Error) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"out: {folder} cannot be written: {said}.") from None


async def _visits(options: Options, endpoint: Endpoint, asked: Sequence[Question]) -> list[Visit]:
    async with AsyncOpenAI(
        base_url=endpoint.url, api_key=options.api_key, timeout=options.timeout_s
    ) as client:
        sampling = Sampling(
            model=await _served(client, endpoint, None if options.compare else options.model),
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            constrain=options.constrain,
            seed=options.seed if options.call_seeds else None,
        )
        warmup = f", the first {options.warmup} do not count" if options.warmup else ""
        say(f"{endpoint.name}: {len(asked)} questions{warmup}")
        agent = Agent(client, sampling, options.deadline_s, options.max_rounds)
        users = Users(agent, SystemClock(), options.rate, options.seed)
        return await users.ask(asked, lambda visit: print(report.line(visit), flush=True))


async def _served(client: AsyncOpenAI, endpoint: Endpoint, wanted: str | None) -> str:
    try:
        served = [model.id for model in (await client.models.list()).data]
    except OpenAIError as error:
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(f"{endpoint.url} cannot be used: {said}.") from None
    if not served or wanted not in (None, *served):
        names = ", ".join(served) or "none"
        raise ConfigError(f"{endpoint.url} does not serve {wanted or 'any model'}, but {names}.")
    return wanted or served[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 when a call failed, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m examples.text2sql", description=__doc__)
    add_arguments(parser, Options)
    try:
        options = Options(**given(parser.parse_args(argv), Options))
        summaries = asyncio.run(run(options))
    except (HexgenError, ProcessFailed) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"\n{report.table(summaries)}\n\n{report.NOTE}\nwrote {Path(options.out)}/results.json")
    return int(any(found["failed"] for found in summaries))
