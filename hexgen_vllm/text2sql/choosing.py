"""The last two stages: statements that tell candidates apart, and the candidate that fits them."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen_vllm.tasks import together
from hexgen_vllm.text2sql import grammar, prompts, replies
from hexgen_vllm.text2sql.calls import Caller
from hexgen_vllm.text2sql.candidates import CandidateQuery
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.matching import same_rows
from hexgen_vllm.text2sql.schema import Schema


async def choose(
    caller: Caller,
    database: Database,
    schema: Schema,
    question: str,
    candidates: Sequence[CandidateQuery],
) -> CandidateQuery:
    """Return the best candidate: the one that passes most tests, and the first of several.

    Candidates without a result are out; those that agree need no tests.
    """
    running = [candidate for candidate in candidates if candidate.outcome.rows is not None]
    if len(running) < 2 or _agree(running):
        return running[0] if running else candidates[0]
    queries = [candidate.sql for candidate in running]
    tests = await together(
        _unit_test(caller, schema, question, queries, aspect)
        for aspect in range(len(prompts.TEST_ASPECTS))
    )
    passed = await together(
        _passes(caller, database, question, candidate, test, f"{number}/{i}")
        for number, candidate in enumerate(running)
        for i, test in enumerate(tests)
    )
    scores = [sum(passed[n * len(tests) : (n + 1) * len(tests)]) for n in range(len(running))]
    return running[scores.index(max(scores))]


def agreed(candidates: Sequence[CandidateQuery]) -> CandidateQuery:
    """Return, without asking a model, a candidate whose result most of the others have, too."""
    running = [candidate for candidate in candidates if candidate.outcome.rows is not None]
    if not running:
        return candidates[0]
    return max(running, key=lambda one: sum(_agree([one, other]) for other in running))


def _agree(candidates: Sequence[CandidateQuery]) -> bool:
    first = candidates[0].outcome.rows or ()
    return all(same_rows(c.outcome.rows or (), first, ordered=True) for c in candidates)


async def _unit_test(
    caller: Caller, schema: Schema, question: str, queries: Sequence[str], aspect: int
) -> str:
    prompt = prompts.unit_test(schema, question, queries, aspect)
    said = await caller.ask("generate_unit_test", str(aspect), prompt, grammar.unit_test())
    return " ".join(replies.lines(said, most=1))


async def _passes(
    caller: Caller,
    database: Database,
    question: str,
    candidate: CandidateQuery,
    test: str,
    place: str,
) -> bool:
    prompt = prompts.evaluate(database.product, question, candidate.sql, candidate.outcome, test)
    return replies.passes(await caller.ask("evaluate", place, prompt, grammar.verdict()))
