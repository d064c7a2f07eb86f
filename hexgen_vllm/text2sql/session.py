"""Questions put to one endpoint after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from openai import AsyncOpenAI, OpenAIError

from hexgen_vllm.client import async_http_client
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql import report
from hexgen_vllm.text2sql.agent import Agent
from hexgen_vllm.text2sql.calls import Sampling
from hexgen_vllm.text2sql.options import AgentOptions, named_url
from hexgen_vllm.text2sql.questions import Question
from hexgen_vllm.text2sql.users import Users, Visit


class AskedEndpoint(NamedTuple):
    """A server and what it is called in the report.

    Attributes:
        constrain: whether its answers are held to grammars; as the options say by default.
    """

    name: str
    url: str
    constrain: bool | None = None


class Played(NamedTuple):
    """What came of the questions at one endpoint: figures, and visits in order of arrival."""

    summary: dict[str, Any]
    visits: Sequence[Visit]


async def named(options: AgentOptions) -> AsyncGenerator[AskedEndpoint, None]:
    """Yield the endpoints of ``base_url``."""
    for word in options.base_url:
        yield AskedEndpoint(*named_url(word))


async def play(
    options: AgentOptions,
    asked: Sequence[Question],
    endpoints: AsyncGenerator[AskedEndpoint, None],
    tell: Callable[[Visit], None],
    model: str | None = None,
) -> AsyncGenerator[Played, None]:
    """Put the same questions to every endpoint; the first ``warmup`` of them do not count.

    Args:
        options: how they are put.
        asked: one question for each user.
        endpoints: who is asked; one that lives only until the next is asked for, is fine.
        tell: called when a question has been answered.
        model: served name that an endpoint must have; its first by default.

    Raises:
        ConfigError: an endpoint cannot be used.
    """
    async with aclosing(endpoints) as found:
        async for endpoint in found:
            visits = await _visits(options, endpoint, asked, tell, model)
            counted = visits[_warmup(options) :]
            yield Played(report.summary(endpoint.name, counted, options.rate), counted)


async def _visits(
    options: AgentOptions,
    endpoint: AskedEndpoint,
    asked: Sequence[Question],
    tell: Callable[[Visit], None],
    model: str | None,
) -> list[Visit]:
    async with AsyncOpenAI(
        base_url=endpoint.url,
        api_key=options.api_key,
        timeout=options.timeout_s,
        http_client=async_http_client(timeout=options.timeout_s),  # hears of slack
    ) as client:
        sampling = Sampling(
            model=await _served(client, endpoint, model),
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            constrain=options.constrain if endpoint.constrain is None else endpoint.constrain,
            seed=options.seed if options.call_seeds else None,
        )
        warmup = f", the first {_warmup(options)} do not count" if _warmup(options) else ""
        report.say(f"{endpoint.name}: {len(asked)} questions{warmup}")
        agent = Agent(
            client, sampling, options.deadline_s, options.max_rounds, not options.same_effort
        )
        users = Users(agent, SystemClock(), options.rate, options.seed)
        return await users.ask(asked, tell)


def _warmup(options: AgentOptions) -> int:
    """Return how many of the first users do not count; all do where questions are asked once."""
    return options.warmup if options.users else 0


async def _served(client: AsyncOpenAI, endpoint: AskedEndpoint, wanted: str | None) -> str:
    try:
        served = [model.id for model in (await client.models.list()).data]
    except (OpenAIError, ValueError) as error:
        why = f"{error} {error.__cause__ or ''}"  # a lost connection has its cause, not its text
        said = " ".join(why.split())[:200].rstrip(".")
        text = f"{endpoint.url} cannot be used: {said}. Another is named by --base-url."
        raise ConfigError(text) from None
    if not served or wanted not in (None, *served):
        names = ", ".join(served) or "none"
        raise ConfigError(f"{endpoint.url} does not serve {wanted or 'any model'}, but {names}.")
    return wanted or served[0]
