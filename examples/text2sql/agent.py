"""The agent: a question and a database in, a query and its rows out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from openai import AsyncOpenAI, OpenAIError

from examples.text2sql.calls import Caller, Sampling, Usage, together
from examples.text2sql.candidates import Candidate, Writer
from examples.text2sql.choosing import choose
from examples.text2sql.linking import linked_schema
from examples.text2sql.prompts import CANDIDATES
from examples.text2sql.sandbox import Limits, Row, Sandbox
from examples.text2sql.schema import read_schema
from hexgen_vllm import Workflow

WORKFLOW_TYPE = "text2sql"
End = Literal["completed", "refused", "invalid", "failed"]


@dataclass(frozen=True)
class Answer:
    """What the agent found.

    Attributes:
        sql: the query, empty when there is none.
        columns: names of the result's columns.
        rows: its result, ``None`` when there is none.
        error: why there is none.
        refused: whether that is because the sandbox refused the query.
        failed: whether that is because a call failed, and not because of the query.
        rounds: revisions of all candidates together.
        refused_queries: queries of all candidates that the sandbox refused.
        usage: calls and tokens.
    """

    usage: Usage
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
class Agent:
    """Answers questions through one client.

    Attributes:
        client: where calls go.
        sampling: how answers are drawn.
        deadline_s: seconds for a whole question; none by default.
        max_rounds: most revisions of a candidate.
        limits: what a query may use.
    """

    client: AsyncOpenAI
    sampling: Sampling
    deadline_s: float | None = None
    max_rounds: int = 4
    limits: Limits = field(default_factory=Limits)

    async def answer(self, path: Path, question: str, key: str = "") -> Answer:
        """Answer one question about the SQLite file ``path``; what goes wrong is in the answer.

        All calls are one workflow with one deadline, and its end is told to the router.

        Raises:
            sqlite3.Error: the file cannot be read.
        """
        async with Workflow(
            self.client, deadline_s=self.deadline_s, type=WORKFLOW_TYPE
        ) as workflow:
            caller = Caller(workflow, self.sampling, key or question)
            try:
                return await self._solve(caller, path, question)
            except OpenAIError as error:
                said = " ".join(str(error).split())[:300]
                return Answer(caller.usage, error=f"a call failed: {said}", failed=True)

    async def _solve(self, caller: Caller, path: Path, question: str) -> Answer:
        whole = await asyncio.to_thread(read_schema, path)
        schema = await linked_schema(caller, path, whole, question)
        sandbox = Sandbox(path, self.limits)
        writer = Writer(caller, sandbox, schema, question, self.max_rounds)
        candidates = await together(writer.write(style) for style in range(len(CANDIDATES)))
        chosen = await choose(caller, schema, question, candidates)
        return _answer(caller.usage, chosen, candidates)


def _answer(usage: Usage, chosen: Candidate, candidates: Sequence[Candidate]) -> Answer:
    return Answer(
        usage=usage,
        sql=chosen.sql,
        columns=chosen.outcome.columns,
        rows=chosen.outcome.rows,
        error=chosen.outcome.error,
        refused=chosen.outcome.refused,
        rounds=sum(candidate.rounds for candidate in candidates),
        refused_queries=sum(candidate.refused for candidate in candidates),
    )
