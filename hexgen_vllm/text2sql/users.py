"""Many users: each arrives at a random moment, asks one question, and has one deadline."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hexgen_vllm.clock import Clock
from hexgen_vllm.text2sql.agent import Agent, SqlAnswer
from hexgen_vllm.text2sql.questions import Question


@dataclass(frozen=True)
class Visit:
    """How one user's question went.

    Attributes:
        question: what was asked.
        answer: what came back.
        latency_s: seconds from the user's arrival to the answer.
        deadline_s: seconds that there were.
    """

    question: Question
    answer: SqlAnswer
    latency_s: float
    deadline_s: float

    @property
    def served(self) -> bool:
        """Whether no call failed, whatever came of the query."""
        return not self.answer.failed

    @property
    def on_time(self) -> bool:
        """Whether it was served within the deadline."""
        return self.served and self.latency_s <= self.deadline_s

    @property
    def matches(self) -> bool:
        """Whether the rows are those of the gold query."""
        return self.question.is_matched_by(self.answer.rows, self.answer.sql)


Report = Callable[[Visit], None]


@dataclass(frozen=True)
class Users:
    """Users of one agent.

    Attributes:
        agent: who answers; its deadline is every user's.
        clock: what latencies are measured with.
        rate: mean arrivals, users/s; 0 lets each wait for the one before.
        seed: of the arrivals.
    """

    agent: Agent
    clock: Clock
    rate: float = 0.0
    seed: int = 0

    async def ask(self, questions: Sequence[Question], report: Report) -> list[Visit]:
        """Play one user for each question; return the visits in order of arrival.

        Args:
            questions: one for each user; the same one may come again.
            report: called when a visit has ended.
        """
        if not self.rate:
            return [await self._visit(n, q, report) for n, q in enumerate(questions)]
        rng = random.Random(f"arrivals/{self.seed}")
        due_s = self.clock.now()
        tasks: list[asyncio.Task[Visit]] = []
        try:
            for number, question in enumerate(questions):
                due_s += rng.expovariate(self.rate)
                await asyncio.sleep(max(due_s - self.clock.now(), 0.0))
                tasks.append(asyncio.create_task(self._visit(number, question, report, due_s)))
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _visit(
        self, number: int, question: Question, report: Report, due_s: float | None = None
    ) -> Visit:
        start_s = self.clock.now() if due_s is None else due_s
        answer = await self.agent.answer(
            question.database, question.text, key=f"{number}/{question.id}"
        )
        latency_s = self.clock.now() - start_s
        visit = Visit(question, answer, latency_s, self.agent.deadline_s or float("inf"))
        report(visit)
        return visit
