"""The agent with the same effort for every question, against effort by slack: late, right, calls.

    python -m benchmarks.text2sql.effort --rates 1 1.5 2 --seeds 5 --out out/effort.json

A real router and the real agent, before one engine that is emulated: it has some slots, and a token
takes a fixed time. All that is in virtual time, so it does not matter how busy the machine is. The
answers are those of the demo's trained model, each computed once. With ``--drawn`` they are right
with given chances instead, independently of each other, as those of a better model may be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Final, Protocol

from aiohttp import web
from openai import AsyncOpenAI

from benchmarks import virtual_time
from benchmarks.text2sql.answers import Answer, ModelAnswers
from examples.text2sql.databases import build_all
from examples.text2sql.main import FILE, opened
from examples.text2sql.options import MODEL
from hexgen_vllm.client import async_http_client
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
ANSWERS: Final = Path(__file__).with_name("answers.json")
"""What the demo's model answers in this benchmark."""


@dataclass(frozen=True)
class EffortOptions:
    """What is played."""

    questions: int = option(96, "questions of each run that count", least=1)
    warmup: int = option(24, "questions before those, which teach the router", least=0)
    rates: tuple[str, ...] = option(("1.0", "1.5", "2.0"), "arrivals, questions/s")
    seeds: int = option(5, "runs of each, with other questions and arrivals", least=1)
    deadline_s: float = option(12.0, "deadline of a question, seconds", least=0.1)
    slots: int = option(8, "calls that the engine runs at once", least=1)
    step_s: float = option(0.05, "time of a token, seconds", least=0.0)
    max_rounds: int = option(2, "most revisions of a candidate query", least=0, most=20)
    model: str = option(str(MODEL), "folder of the model that answers")
    answers: str = option(str(ANSWERS), "file for its answers, which are computed once")
    drawn: bool = option(False, "draw answers with the chances below, in place of a model's")
    right: float = option(0.55, "chance that a candidate is right", least=0.0, most=1.0)
    broken: float = option(0.15, "chance that it does not run", least=0.0, most=1.0)
    judged: float = option(0.8, "chance that a verdict is right", least=0.0, most=1.0)
    seed: int = option(0, "the first seed of questions, arrivals and drawn answers", least=0)
    out: str = option("out/effort.json", "file for the figures")

    def __post_init__(self) -> None:
        check(self)


class Answers(Protocol):
    """Who says what an engine answers."""

    def to(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """Return the answer to a chat."""


class Emulated:
    """An engine of given speed with the answers of another."""

    def __init__(self, options: EffortOptions, answers: Answers) -> None:
        self._options = options
        self._answers = answers
        self._slots = asyncio.Semaphore(options.slots)

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
        found = self._answers.to(json.loads(await request.read())["messages"])
        async with self._slots:
            await asyncio.sleep(found.tokens * self._options.step_s)
        choice = {"index": 0, "finish_reason": "stop",
                  "message": {"role": "assistant", "content": found.text}}  # fmt: skip
        usage = {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.tokens,
                 "total_tokens": found.prompt_tokens + found.tokens}  # fmt: skip
        return web.json_response(
            {"id": "c", "object": "chat.completion", "created": 1, "model": "m",
             "choices": [choice], "usage": usage}
        )  # fmt: skip


class DrawnAnswers:
    """Answers that know what is right, and say so some of the time.

    Args:
        options: the chances.
        gold: right queries by question.
    """

    def __init__(self, options: EffortOptions, gold: Mapping[str, str]) -> None:
        self._options = options
        self._gold = gold
        self._rng = random.Random(f"answers/{options.seed}")

    def to(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """Return the answer to a chat."""
        system, asked = (message["content"] for message in messages)
        stage = stage_of(system)
        tokens = max(int(TOKENS[stage] * 2 ** self._rng.uniform(-1.0, 1.0)), 1)
        return Answer(self._says(stage, asked), 300, tokens)

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
    options: EffortOptions,
    rate: float,
    asked: Sequence[Question],
    answers: Answers,
    *,
    by_slack: bool,
) -> dict[str, Any]:
    """Put ``asked`` at ``rate``; returns the figures of those that count."""
    clock = virtual_time.LoopClock()
    async with Emulated(options, answers).running() as url:
        where = RouterOptions(port=0, worker_urls=(url,))
        async with (
            Router(where, DispatchOptions(policy="slack"), clock=clock) as router,
            async_http_client(timeout=None) as http,
        ):
            client = AsyncOpenAI(base_url=f"{router.url}/v1", api_key="k", http_client=http)
            while not (await client.models.list()).data:
                await asyncio.sleep(0.1)
            agent = Agent(
                client, Sampling("m"), options.deadline_s, options.max_rounds, by_slack, clock=clock
            )
            visits = await Users(agent, clock, rate, options.seed).ask(asked, lambda _: None)
    return figures(visits[options.warmup :], rate, by_slack=by_slack)


def figures(visits: Sequence[Visit], rate: float, *, by_slack: bool) -> dict[str, Any]:
    """Return what came of a run."""
    found = report.summary("by slack" if by_slack else "same effort", visits, rate)
    found["right_on_time"] = sum(visit.matches and visit.on_time for visit in visits)
    return found


def run(options: EffortOptions) -> Iterator[dict[str, Any]]:
    """Play every rate with both; the questions and their arrivals are the same."""
    with tempfile.TemporaryDirectory() as folder, opened(build_all(Path(folder))) as databases:
        known = load(databases, FILE)
        model = None if options.drawn else ModelAnswers(Path(options.model), Path(options.answers))
        for rate in map(float, options.rates):
            for seed in range(options.seed, options.seed + options.seeds):
                rng = random.Random(seed)
                asked = drawn(known, options.warmup, rng) + drawn(known, options.questions, rng)
                gold = {one.text: one.gold for one in asked}
                one = replace(options, seed=seed)
                for by_slack in (False, True):
                    answers = model or DrawnAnswers(one, gold)
                    played = play(one, rate, asked, answers, by_slack=by_slack)
                    yield {"seed": seed, **virtual_time.run(played)}
                if model is not None:
                    model.keep()


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as a table: means over the seeds, and the least and the most."""
    columns = ("rate", "effort", "on time", "right", "right and on time", "calls", "P50", "P95")
    runs: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for one in found:
        runs.setdefault((one["rate"], one["policy"]), []).append(one)

    def share(of: Sequence[Mapping[str, Any]], name: str) -> str:
        shares = [100 * one[name] / one["questions"] for one in of]
        return f"{mean(shares):.1f} ({min(shares):.0f} to {max(shares):.0f}) %"

    return aligned(
        columns,
        [
            [f"{rate:g}", policy, share(of, "on_time"), share(of, "execution_match"),
             share(of, "right_on_time"), f"{mean(o['calls'] / o['questions'] for o in of):.1f}",
             *(f"{mean(o[name] for o in of):.1f}" for name in ("p50_s", "p95_s"))]
            for (rate, policy), of in runs.items()
        ],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text2sql.effort")
    add_arguments(parser, EffortOptions)
    try:
        options = EffortOptions(**given(parser.parse_args(argv), EffortOptions))
        found = []
        for one in run(options):
            found.append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)
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
