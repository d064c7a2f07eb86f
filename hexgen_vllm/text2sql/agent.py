"""The agent: a question and a database in, a query and its rows out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from openai import AsyncOpenAI, OpenAIError

from hexgen_vllm.client import Workflow
from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.tasks import together
from hexgen_vllm.text2sql import grammar, prompts, replies
from hexgen_vllm.text2sql.calls import Caller, Sampling, TokenUsage
from hexgen_vllm.text2sql.candidates import CandidateQuery, QueryWriter, agreed, choose
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.options import MOST_QUESTION_CHARS
from hexgen_vllm.text2sql.outcome import Row
from hexgen_vllm.text2sql.prompts import CANDIDATES
from hexgen_vllm.text2sql.schema import Schema

WORKFLOW_TYPE: Final = "text2sql"
FEWEST: Final = 1
USUAL: Final = 2
MOST: Final = len(CANDIDATES)
"""Candidates of a question that is late, of one that is on time, and of one that is early."""
EARLY: Final = 0.5
"""Share of the time left that is to spare when a question counts as early."""
LATE_ROUNDS: Final = 1
"""Most revisions of a candidate when its question is late."""
End = Literal["completed", "refused", "invalid", "failed"]


@dataclass(frozen=True)
class SqlAnswer:
    """What the agent found.

    Attributes:
        sql: the query, empty when there is none.
        columns: names of the result's columns.
        rows: its result, ``None`` when there is none.
        error: why there is none.
        refused: whether that is because the query may not run.
        failed: whether that is because a call failed, and not because of the query.
        rounds: revisions of all candidates together.
        refused_queries: queries of all candidates that were refused.
        usage: calls and tokens.
    """

    usage: TokenUsage
    sql: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] | None = None
    error: str | None = None
    refused: bool = False
    failed: bool = False
    rounds: int = 0
    refused_queries: int = 0

    @property
    def end(self) -> End:
        """How the question ended; ``invalid`` means that no query came that can run."""
        if self.failed:
            return "failed"
        if self.rows is not None:
            return "completed"
        return "refused" if self.refused else "invalid"


@dataclass(frozen=True)
class Effort:
    """What a question is given.

    Attributes:
        candidates: queries that are written at once.
    """

    candidates: int = USUAL

    @classmethod
    def of(cls, slack_s: float | None, remaining_s: float) -> Effort:
        """Return what a workflow can afford before it writes its candidates.

        Args:
            slack_s: how long it has to spare, ``None`` if nobody says. What the router predicts to
                follow is what questions needed so far, so 0 just suffices for that.
            remaining_s: until the deadline.
        """
        if slack_s is None:
            return cls()
        if slack_s < 0:
            return cls(FEWEST)
        return cls(MOST if slack_s > EARLY * remaining_s else USUAL)


@dataclass(frozen=True)
class Agent:
    """Answers questions through one client.

    Attributes:
        client: where calls go.
        sampling: how answers are drawn.
        deadline_s: seconds for a whole question; none by default.
        max_rounds: most revisions of a candidate.
        by_slack: whether a question that the router expects to be late is given fewer candidates
            and revisions, and one that is early more; see :class:`Effort`. Where nobody says how
            the workflow stands there is nothing to go by.
        schema_chars: longest schema in a prompt, characters; of a larger one the tables stay that
            share words with the question.
        clock: what deadlines are measured on; for tests.
    """

    client: AsyncOpenAI
    sampling: Sampling
    deadline_s: float | None = None
    max_rounds: int = 4
    by_slack: bool = True
    schema_chars: int = 40_000
    clock: Clock | None = None

    async def answer(self, database: Database, question: str, key: str = "") -> SqlAnswer:
        """Answer one question about ``database``; what goes wrong is in the answer.

        All calls are one workflow with one deadline, and its end is told to the router.

        Args:
            database: what is asked about.
            question: the question, of up to ``MOST_QUESTION_CHARS`` characters.
            key: what tells this question from others in seeds; the question by default.

        Raises:
            ConfigError: the question is empty or too long.
        """
        if not question.strip() or len(question) > MOST_QUESTION_CHARS:
            raise ConfigError(
                f"a question must have 1 to {MOST_QUESTION_CHARS} characters, not "
                f"{len(question.strip())}."
            )
        question = " ".join(question.encode(errors="replace").decode().split())
        async with Workflow(
            self.client, deadline_s=self.deadline_s, type=WORKFLOW_TYPE, clock=self.clock
        ) as workflow:
            caller = Caller(workflow, self.sampling, key or question)
            try:
                return await self._solve(caller, database, question)
            except OpenAIError as error:
                said = " ".join(str(error).split())[:300]
                return SqlAnswer(caller.usage, error=f"a call failed: {said}", failed=True)

    async def _solve(self, caller: Caller, database: Database, question: str) -> SqlAnswer:
        whole = database.schema().within(self.schema_chars, question)
        schema = await _linked_schema(caller, database, whole, question)
        effort = Effort.of(caller.slack_s if self.by_slack else None, caller.remaining_s)

        def may_revise(rounds: int) -> bool:
            late = self.by_slack and (caller.slack_s or 0.0) < 0
            return rounds < (min(LATE_ROUNDS, self.max_rounds) if late else self.max_rounds)

        writer = QueryWriter(caller, database, schema, question, may_revise)
        candidates = await together(writer.write(style) for style in range(effort.candidates))
        if self.by_slack and (caller.slack_s or 0.0) < 0:
            chosen = agreed(candidates)
        else:
            chosen = await choose(caller, database, schema, question, candidates)
        return _answer(caller.usage, chosen, candidates)


async def _linked_schema(
    caller: Caller, database: Database, schema: Schema, question: str
) -> Schema:
    """Return what of ``schema`` the question is about, with values that it may mean."""
    said = await caller.ask(
        "extract_keywords", "", prompts.keywords(question), grammar.keywords(question)
    )
    words = replies.lines(said, most=4)
    found = await asyncio.to_thread(database.find_values, schema, words)
    known = schema.with_values(found)
    names = known.names()
    said = await caller.ask(
        "schema_linking", "", prompts.links(known, question), grammar.links(names)
    )
    return known.only(replies.links(said, names))


def _answer(
    usage: TokenUsage, chosen: CandidateQuery, candidates: Sequence[CandidateQuery]
) -> SqlAnswer:
    return SqlAnswer(
        usage=usage,
        sql=chosen.sql,
        columns=chosen.outcome.columns,
        rows=chosen.outcome.rows,
        error=chosen.outcome.error,
        refused=chosen.outcome.refused,
        rounds=sum(candidate.rounds for candidate in candidates),
        refused_queries=sum(candidate.refused for candidate in candidates),
    )
