"""The agent with the same effort for every question, against effort by slack: late, right, calls.

    python -m benchmarks.text2sql.effort --rates 0.7 1.0 1.3 --out out/effort.json

A real router and the real agent, before one engine that is emulated: it has some slots, a token
takes a fixed time, and its answers are right with given chances, independently of each other. So
the figures say what effort by slack is worth if models are like that, not how good a model is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from openai import AsyncOpenAI

from examples.text2sql.databases import build_all
from examples.text2sql.main import FILE, opened
from hexgen_vllm import wire
from hexgen_vllm.client import async_http_client
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import HexgenError
from hexgen_vllm.option import add_arguments, check, given, option
from hexgen_vllm.report import results as files
from hexgen_vllm.report.table import aligned
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.text2sql import report
from hexgen_vllm.text2sql.agent import Agent
from hexgen_vllm.text2sql.calls import Sampling
from hexgen_vllm.text2sql.questions import Question, drawn, load
from hexgen_vllm.text2sql.users import Users, Visit

TOKENS: Final = {
    "extract_keywords": 12, "schema_linking": 25, "generate_candidate": 90, "revise": 90,
    "generate_unit_test": 30, "evaluate": 25,
}  # fmt: skip
"""Mean length of an answer by stage; each is drawn from half to twice of it."""
_STAGE: Final = wire.header_name("stage")


@dataclass(frozen=True)
class EffortOptions:
    """What is played."""

    questions: int = option(100, "questions of each run that count", least=1)
    warmup: int = option(12, "questions before those, which teach the router", least=0)
    rates: tuple[str, ...] = option(("0.7", "1.0", "1.3"), "arrivals, questions/s")
    deadline_s: float = option(12.0, "deadline of a question, seconds", least=0.1)
    slots: int = option(8, "calls that the engine runs at once", least=1)
    step_s: float = option(0.02, "time of a token, seconds", least=0.0)
    right: float = option(0.55, "chance that a candidate is right", least=0.0, most=1.0)
    broken: float = option(0.15, "chance that it does not run", least=0.0, most=1.0)
    judged: float = option(0.8, "chance that a verdict is right", least=0.0, most=1.0)
    seed: int = option(0, "of questions, arrivals and answers", least=0)
    out: str = option("out/effort.json", "file for the figures")

    def __post_init__(self) -> None:
        check(self)


class Emulated:
    """An engine that knows the answers, and gives them some of the time.

    Args:
        options: its speed and its chances.
        gold: right queries by question.
    """

    def __init__(self, options: EffortOptions, gold: Mapping[str, str]) -> None:
        self._options = options
        self._gold = gold
        self._slots = asyncio.Semaphore(options.slots)
        self._rng = random.Random(f"answers/{options.seed}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve for as long as the context lasts; gives the URL."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            assert runner.addresses
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        card = {"id": "m", "object": "model", "max_model_len": 32768}
        return web.json_response({"object": "list", "data": [card]})

    async def _answer(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        system, asked = (message["content"] for message in body["messages"])
        stage = stage_of(system)
        tokens = max(int(TOKENS[stage] * 2 ** self._rng.uniform(-1.0, 1.0)), 1)
        text = self._says(stage, asked)
        async with self._slots:
            await asyncio.sleep(tokens * self._options.step_s)
        choice = {"index": 0, "finish_reason": "stop",
                  "message": {"role": "assistant", "content": text}}  # fmt: skip
        usage = {"prompt_tokens": 300, "completion_tokens": tokens, "total_tokens": 300 + tokens}
        return web.json_response(
            {"id": "c", "object": "chat.completion", "created": 1, "model": "m",
             "choices": [choice], "usage": usage}
        )  # fmt: skip

    def _says(self, stage: str, asked: str) -> str:
        chance = self._rng.random()
        question = asked.partition("Question: ")[2].partition("\n")[0]
        gold = self._gold[question]
        if stage in ("generate_candidate", "revise"):
            options = self._options
            wrong = self._rng.choice([sql for sql in self._gold.values() if sql != gold])
            sql = gold if chance < options.right else wrong
            broken = options.right <= chance < options.right + options.broken
            return f"```sql\n{'SELECT no_such_column' if broken else sql}\n```"
        if stage == "evaluate":
            is_right = asked.partition("Query:\n")[2].partition("\nResult: ")[0] == gold
            told = is_right if chance < self._options.judged else not is_right
            return f"verdict: {'pass' if told else 'fail'}"
        return "The result is right." if stage == "generate_unit_test" else ""


def stage_of(system: str) -> str:
    """Return the stage that a prompt is of: a router tells stock engines nothing."""
    begins = {
        "You prepare": "extract_keywords", "You choose": "schema_linking",
        "You turn": "generate_candidate", "You correct": "revise",
        "You test": "generate_unit_test", "You judge": "evaluate",
    }  # fmt: skip
    return next(stage for begin, stage in begins.items() if system.startswith(begin))


async def play(
    options: EffortOptions, rate: float, asked: Sequence[Question], *, by_slack: bool
) -> dict[str, Any]:
    """Put ``asked`` at ``rate``; returns the figures of those that count."""
    engine = Emulated(options, {one.text: one.gold for one in asked})
    async with engine.running() as url:
        where = RouterOptions(port=0, worker_urls=(url,))
        async with (
            Router(where, DispatchOptions(policy="slack")) as router,
            async_http_client() as http,
        ):
            client = AsyncOpenAI(base_url=f"{router.url}/v1", api_key="k", http_client=http)
            while not (await client.models.list()).data:
                await asyncio.sleep(0.1)
            agent = Agent(client, Sampling("m"), options.deadline_s, by_slack=by_slack)
            users = Users(agent, SystemClock(), rate, options.seed)
            visits = await users.ask(asked, lambda _: None)
    return figures(visits[options.warmup :], rate, by_slack=by_slack)


def figures(visits: Sequence[Visit], rate: float, *, by_slack: bool) -> dict[str, Any]:
    """Return what came of a run."""
    found = report.summary("by slack" if by_slack else "same effort", visits, rate)
    found["right_on_time"] = sum(visit.matches and visit.on_time for visit in visits)
    return found


async def run(options: EffortOptions) -> list[dict[str, Any]]:
    """Play every rate with both; the questions and their arrivals are the same."""
    found = []
    with tempfile.TemporaryDirectory() as folder, opened(build_all(Path(folder))) as databases:
        known = load(databases, FILE)
        rng = random.Random(options.seed)
        asked = drawn(known, options.warmup, rng) + drawn(known, options.questions, rng)
        for rate in map(float, options.rates):
            for by_slack in (False, True):
                found.append(await play(options, rate, asked, by_slack=by_slack))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as a table."""
    columns = ("rate", "effort", "on time", "match", "right and on time", "calls", "P50", "P95")
    return aligned(
        columns,
        [
            [f"{one['rate']:g}", one["policy"], f"{one['on_time'] / one['questions']:.0%}",
             f"{one['execution_match'] / one['questions']:.0%}",
             f"{one['right_on_time'] / one['questions']:.0%}",
             f"{one['calls'] / one['questions']:.1f}", f"{one['p50_s']:.1f}", f"{one['p95_s']:.1f}"]
            for one in found
        ],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text2sql.effort")
    add_arguments(parser, EffortOptions)
    try:
        options = EffortOptions(**given(parser.parse_args(argv), EffortOptions))
        found = asyncio.run(run(options))
    except (HexgenError, sqlite3.Error) as error:
        print(f"effort: {error}", file=sys.stderr)
        return 2
    out = Path(options.out)
    with suppress(FileExistsError):
        out.parent.mkdir(parents=True)
    files.write(out, found)
    print(f"{table(found)}\n\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
