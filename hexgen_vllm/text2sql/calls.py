"""One question's calls to the model: counted, seeded, and held to a grammar when asked to."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from hexgen_vllm.client import Workflow
from hexgen_vllm.text2sql.grammar import Grammar
from hexgen_vllm.text2sql.prompts import ChatPrompt
from hexgen_vllm.text2sql.replies import without_thought


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        model: served model name.
        temperature: 0 takes the likeliest token.
        max_tokens: longest answer of one call, tokens.
        constrain: hold answers to the grammar of their stage.
        seed: calls of the same question, stage and place draw alike; none by default.
    """

    model: str
    temperature: float = 0.0
    max_tokens: int = 1024
    constrain: bool = False
    seed: int | None = None


@dataclass
class TokenUsage:
    """What a question has used: calls sent, prompt and output tokens as the server counts them."""

    calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    stages: dict[str, int] = field(default_factory=dict)


class Caller:
    """Sends the calls of one question.

    Args:
        workflow: the open workflow that they belong to.
        sampling: how answers are drawn.
        key: what tells this question from others; part of the seeds.
    """

    def __init__(self, workflow: Workflow[AsyncOpenAI], sampling: Sampling, key: str) -> None:
        self.usage = TokenUsage()
        self._workflow = workflow
        self._sampling = sampling
        self._key = key

    @property
    def slack_s(self) -> float | None:
        """Seconds that the question has to spare, as the last answer told."""
        return self._workflow.slack_s

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, ``inf`` without one."""
        return self._workflow.remaining_s

    async def ask(self, stage: str, place: str, prompt: ChatPrompt, grammar: Grammar) -> str:
        """Return the answer to one prompt.

        Args:
            stage: name of the stage.
            place: tells apart the calls of a stage.
            prompt: what is asked.
            grammar: what an answer may be; kept to when ``sampling.constrain``.

        Raises:
            openai.OpenAIError: the call failed.
        """
        self.usage.calls += 1
        self.usage.stages[stage] = self.usage.stages.get(stage, 0) + 1
        sampling = self._sampling
        answer = await self._workflow.stage(stage).chat.completions.create(
            model=sampling.model,
            messages=[
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            extra_body={
                **self._seed(f"{self._key}/{stage}/{place}"),
                **(grammar.extra_body() if sampling.constrain else {}),
            },
        )
        if answer.usage is not None:
            self.usage.prompt_tokens += answer.usage.prompt_tokens
            self.usage.output_tokens += answer.usage.completion_tokens
        text = answer.choices[0].message.content if answer.choices else None
        return without_thought(text or "")

    def _seed(self, where: str) -> dict[str, int]:
        seed = self._sampling.seed
        return {} if seed is None else {"seed": zlib.crc32(f"{seed}/{where}".encode())}
