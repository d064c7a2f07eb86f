"""Ask an agent that writes SQL questions about three databases, and report its answers."""

from __future__ import annotations

import argparse
import asyncio
import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from examples.text2sql.databases import UNSEEN, build_all
from examples.text2sql.endpoints import endpoints
from examples.text2sql.options import Options
from hexgen_vllm.cluster import ProcessFailed
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.option import add_arguments, given
from hexgen_vllm.report.plot import check_plot, draw_attainment
from hexgen_vllm.text2sql import report
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.outcome import QueryLimits
from hexgen_vllm.text2sql.questions import drawn, load
from hexgen_vllm.text2sql.report import say
from hexgen_vllm.text2sql.session import Played, play

FILE: Final = Path(__file__).with_name("questions.yaml")
UNSEEN_FILE: Final = Path(__file__).with_name("unseen.yaml")


async def run(options: Options) -> list[dict[str, Any]]:
    """Ask every endpoint the same questions; write and return the figures, one for each.

    Raises:
        ConfigError: an endpoint or the questions cannot be used, or ``out`` cannot be written.
        ProcessFailed: a server that was to be started here did not start.
    """
    out = Path(options.out)
    if options.compare:
        check_plot(out / "comparison.png")
    file = UNSEEN_FILE if options.unseen else FILE
    file = file if options.questions is None else Path(options.questions)
    summaries: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    with opened(_databases(out / "databases", options.unseen)) as databases:
        known = load(databases, file)
        count = options.users or len(known)
        rng = random.Random(f"questions/{options.seed}")
        # The warm-up ends with its own draw: those that count begin with each question once.
        asked = drawn(known, options.warmup, rng) + drawn(known, count, rng)
        model = None if options.compare else options.model
        async for played in play(
            options,
            asked,
            endpoints(options),
            lambda visit: print(report.line(visit), flush=True),
            model,
        ):
            summaries.append(played.summary)
            curves.append(_curve(played))
            report.write(out / "results.json", summaries, played.visits)
    if options.compare:
        draw_attainment(curves, out / "comparison.png")
    return summaries


def _curve(played: Played) -> dict[str, Any]:
    """Return what a plot needs of a run: when answers came, and how many were right."""
    found = played.summary
    right = found["execution_match"] / found["questions"]
    return {
        "policy": f"{found['policy']} ({right:.0%} right)",
        "latencies_s": [one.latency_s if one.served else None for one in played.visits],
        "deadline_s": found["deadline_s"],
        "rate": found["rate"],
        "workflows": found["questions"],
    }


@contextmanager
def opened(
    paths: Mapping[str, Path], limits: QueryLimits | None = None
) -> Iterator[dict[str, Database]]:
    """Open the databases ``paths`` for as long as the context lasts."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Database.open(path, limits)) for name, path in paths.items()
        }


def _databases(folder: Path, unseen: bool) -> Mapping[str, Path]:
    try:
        return build_all(folder, sources=UNSEEN) if unseen else build_all(folder)
    except (OSError, sqlite3.Error) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"out: {folder} cannot be written: {said}.") from None


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
    if options.compare:
        print(f"wrote {Path(options.out)}/comparison.png")
    return int(any(found["failed"] for found in summaries))
