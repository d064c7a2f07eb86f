"""Candidate queries: written, run, revised for as long as the database objects, and compared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hexgen_vllm.tasks import together
from hexgen_vllm.text2sql import grammar, prompts, replies
from hexgen_vllm.text2sql.calls import Caller
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.grammar import Grammar
from hexgen_vllm.text2sql.outcome import QueryOutcome, same_rows
from hexgen_vllm.text2sql.prompts import ChatPrompt
from hexgen_vllm.text2sql.schema import Schema
from hexgen_vllm.text2sql.sql_grammar import query_grammar


@dataclass(frozen=True)
class CandidateQuery:
    """A query and what came of it.

    Attributes:
        sql: the query, empty when the model gave none.
        outcome: what came of its last run.
        rounds: how often it was revised.
        refused: how many of its versions were refused.
    """

    sql: str
    outcome: QueryOutcome
    rounds: int = 0
    refused: int = 0


class QueryWriter:
    """Writes candidates for one question.

    Args:
        caller: the question's calls.
        database: where queries run.
        schema: the linked part of the database.
        question: the question.
        may_revise: whether a candidate may be revised that has been so many times.
    """

    def __init__(
        self,
        caller: Caller,
        database: Database,
        schema: Schema,
        question: str,
        may_revise: Callable[[int], bool],
    ) -> None:
        self._caller = caller
        self._database = database
        self._schema = schema
        self._question = question
        self._may_revise = may_revise
        self._grammar: Grammar = query_grammar(schema)

    async def write(self, style: int) -> CandidateQuery:
        """Return the candidate of one style, revised until its result may be an answer."""
        prompt = prompts.candidate(self._database.product, style, self._schema, self._question)
        best = await self._query("generate_candidate", str(style), prompt)
        while not best.outcome.is_telling and self._may_revise(best.rounds):
            prompt = prompts.revise(
                self._database.product, self._schema, self._question, best.sql, best.outcome
            )
            new = await self._query("revise", f"{style}/{best.rounds}", prompt)
            repeated = new.sql == best.sql  # the model stands by it
            best = CandidateQuery(
                new.sql, new.outcome, best.rounds + 1, best.refused + new.refused * (not repeated)
            )
            if repeated:
                break
        return best

    async def _query(self, stage: str, place: str, prompt: ChatPrompt) -> CandidateQuery:
        sql = replies.query(
            await self._caller.ask(stage, place, prompt, self._grammar), self._database.dialect
        )
        if not sql:
            return CandidateQuery("", QueryOutcome(error="the answer holds no SQL query"))
        outcome = await asyncio.to_thread(self._database.run, sql)
        return CandidateQuery(sql, outcome, refused=int(outcome.refused))


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
