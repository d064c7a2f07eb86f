"""``hexgen-vllm text2sql``: ask a database of your own questions in plain language.

    hexgen-vllm text2sql --database chinook.sqlite --ask "Which artist has most albums?"

Every question is one workflow with one deadline. What a model writes can read the database and
nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexgen_vllm import option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.options import Options

if TYPE_CHECKING:
    from hexgen_vllm.text2sql.database import Database
    from hexgen_vllm.text2sql.questions import Question
    from hexgen_vllm.text2sql.session import Played
    from hexgen_vllm.text2sql.users import Visit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm text2sql``."""
    option.add_arguments(parser, Options)


def main(args: argparse.Namespace) -> int:
    """Ask; returns 1 when a question got no answer, of many users when a call failed.

    Raises:
        ConfigError: the database, an endpoint or an option cannot be used.
    """
    options = Options(**option.given(args, Options))
    try:
        from hexgen_vllm.text2sql import database, outcome, session  # noqa: F401 - is all there?
    except ModuleNotFoundError as error:
        if str(error.name).startswith("hexgen_vllm"):
            raise
        raise ConfigError(
            f"{error.name} is not installed; pip install 'hexgen-vllm[text2sql]'."
        ) from None
    if options.benchmark is not None:
        return _benchmark(options, Path(options.benchmark))
    limits = outcome.QueryLimits(
        options.query_time_s, options.query_rows, result_bytes=options.query_bytes
    )
    with database.Database.open(options.database, limits) as opened:
        if options.schema:
            print(opened.schema().text())
            return 0
        found = asyncio.run(_run(options, _questions(options, opened)))
    if options.users or len(found) > 1:
        _print_figures(options, [played.summary for played in found])
        return int(any(played.summary["failed"] for played in found))
    return int(any(visit.answer.rows is None for played in found for visit in played.visits))


def _benchmark(options: Options, folder: Path) -> int:
    """Ask the questions of a benchmark and write the predictions beside the figures."""
    from hexgen_vllm.text2sql import benchmark, report

    out = Path(options.out or "out/text2sql")
    with benchmark.opened(folder, options.split, options.most) as opened:
        found = asyncio.run(_run(options, opened.questions))
        for played in found:
            name = f"{played.summary['policy'].replace(':', '-')}-" if len(found) > 1 else ""
            path = out / f"{name}{opened.file_name}"
            opened.write(path, {one.question.id: one.answer.sql for one in played.visits})
            report.say(f"wrote {path}")
        _print_figures(options, [played.summary for played in found])
    return int(any(played.summary["failed"] for played in found))


async def _run(options: Options, known: Sequence[Question]) -> list[Played]:
    from hexgen_vllm.text2sql import report, session

    asked = known
    if options.users:
        from hexgen_vllm.text2sql.questions import drawn

        rng = random.Random(f"questions/{options.seed}")
        asked = drawn(known, options.warmup, rng) + drawn(known, options.users, rng)
    brief = bool(options.users or options.benchmark) or len(options.base_url) > 1
    found: list[Played] = []

    def tell(visit: Visit) -> None:
        if options.json:
            print(json.dumps(report.answered(visit, whole=True)), flush=True)
        else:
            print(report.line(visit) if brief else report.answer(visit), flush=True)

    async for played in session.play(options, asked, session.named(options), tell, options.model):
        found.append(played)
        if options.out is not None:
            summaries = [one.summary for one in found]
            report.write(Path(options.out) / "results.json", summaries, played.visits)
    return found


def _questions(options: Options, database: Database) -> Sequence[Question]:
    from hexgen_vllm.text2sql.questions import Question, load

    name = Path(database.name).stem or "question"
    asked = [Question(f"{name}-{i}", name, database, text) for i, text in enumerate(options.ask, 1)]
    if options.questions is not None:
        asked += load({name: database}, Path(options.questions))
    return asked


def _print_figures(options: Options, summaries: Sequence[dict[str, Any]]) -> None:
    from hexgen_vllm.text2sql import report

    if options.json:
        for found in summaries:
            print(json.dumps(found))
    else:
        print(f"\n{report.table(summaries)}\n\n{report.NOTE}")
