"""Shows that whoever is due first is served first, whatever stands before the engine.

python -m examples.other_stacks.order http://127.0.0.1:30000/v1 MODEL --say headers

The engine's batch is filled with long calls (``--fill`` is its ``--max-num-seqs``). Then calls
arrive that have to wait, the one with the most time first. One of the long calls is given up, and
in its place they run, one at a time. They are printed in the order in which they end. Where this
program itself is kept waiting it may see several ends at once, so a wrong order is tried again. The
exit code is 0 if they end in the order of their deadlines, 1 if not, and 2 if that cannot be said:
they did not have to wait, or a call failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from openai import AsyncOpenAI, AsyncStream, OpenAIError
from openai.types.chat import ChatCompletionChunk

# Far enough away that none is given up for late on a machine that is busy.
DEADLINES_S: Final = (1200, 1100, 1000, 900, 800, 700)
_LONG_DUE_S: Final = 600
_SHORT_TOKENS: Final = 32  # enough for this program to tell which of two ended first
_GAP_S: Final = 0.03  # so that calls arrive in the order in which they are sent
_ARRIVAL_S: Final = 0.3
_TRIES: Final = 12
_MISSES: Final = 5  # by chance one order in 720 is right

Said = Mapping[str, Any]


def headers(deadline_s: int) -> Said:
    """Say it in headers: for our router, and for our engine behind what passes headers on."""
    said = {
        "x-hexgen-workflow-id": f"due-in-{deadline_s}",
        "x-hexgen-workflow-deadline-ms": str(deadline_s * 1000),
    }
    return {"extra_headers": said}


def xargs(deadline_s: int) -> Said:
    """Say it in the body, which every gateway passes on."""
    said = {
        "hexgen_workflow_id": f"due-in-{deadline_s}",
        "hexgen_workflow_deadline_ms": deadline_s * 1000,
    }
    return {"extra_body": {"vllm_xargs": said}}


def agentic(deadline_s: int) -> Said:
    """Say it as clients of vllm-router do."""
    said = {"program_id": f"due-in-{deadline_s}", "deadline_seconds": deadline_s}
    return {"extra_body": {"vllm_xargs": {"agentic_context": said}}}


WAYS: Final[Mapping[str, Callable[[int], Said]]] = {
    "headers": headers,
    "xargs": xargs,
    "agentic": agentic,
}


class Calls:
    """Calls of one model.

    Attributes:
        ended: deadlines of the calls that have ended, in that order.
    """

    def __init__(self, base_url: str, model: str, long_tokens: int) -> None:
        self._client = AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600.0)
        self._model, self._long_tokens = model, long_tokens
        self._began_s = time.monotonic()
        self.ended: list[int] = []

    async def fill(self, say: Callable[[int], Said]) -> AsyncStream[ChatCompletionChunk]:
        """Begin a long call that is due before the others, and return it once it has begun.

        Without a deadline it would give way to them at once.
        """
        said = say(_LONG_DUE_S)
        stream: AsyncStream[ChatCompletionChunk] = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": "Count to a thousand."}],
            max_tokens=self._long_tokens,
            stream=True,
            **{**said, "extra_body": {"ignore_eos": True, **said.get("extra_body", {})}},
        )
        events = stream.__aiter__()
        while not (await events.__anext__()).choices[0].delta.content:
            pass
        return stream

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, deadline_s: int, say: Callable[[int], Said]) -> None:
        """Make a call that is due in ``deadline_s``, and note when it ends."""
        said = say(deadline_s)
        await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": "Say yes or no."}],
            max_tokens=_SHORT_TOKENS,
            **{**said, "extra_body": {"ignore_eos": True, **said.get("extra_body", {})}},
        )
        self.ended.append(deadline_s)
        after_s = time.monotonic() - self._began_s
        print(f"due in {deadline_s:4} s: answered {after_s:5.1f} s after the first call")


async def order(
    base_url: str, model: str, say: str, fill: int, long_tokens: int
) -> list[int] | None:
    """Return the deadlines of calls that had to wait, in the order in which they ended.

    ``None`` if one of them did not have to wait, or a long call ended and let several run at once.
    """
    calls = Calls(base_url, model, long_tokens)
    first, *others = await asyncio.gather(*(calls.fill(WAYS[say]) for _ in range(fill)))
    running = [asyncio.create_task(read(stream)) for stream in others]
    waiting = []
    for deadline_s in DEADLINES_S:
        waiting.append(asyncio.create_task(calls.ask(deadline_s, WAYS[say])))
        await asyncio.sleep(_GAP_S)
    await asyncio.sleep(_ARRIVAL_S)
    at_once = bool(calls.ended)
    await first.close()
    await asyncio.gather(*waiting)
    at_once |= any(task.done() for task in running)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for stream in others:
        await stream.close()
    await calls.close()
    return None if at_once else calls.ended


async def read(stream: AsyncStream[ChatCompletionChunk]) -> None:
    """Read a stream to its end."""
    async for _ in stream:
        pass


def main(argv: list[str] | None = None) -> int:
    """Run the calls that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description="Are calls served in the order of deadlines?")
    parser.add_argument("base_url", help="such as http://127.0.0.1:30000/v1")
    parser.add_argument("model")
    parser.add_argument("--say", choices=WAYS, default="headers", help="how deadlines are said")
    parser.add_argument("--fill", type=int, default=8, help="calls that fill the engine's batch")
    parser.add_argument("--long-tokens", type=int, default=900, help="tokens of each of those")
    args = parser.parse_args(argv)
    if min(args.fill, args.long_tokens) < 1:
        parser.error("--fill and --long-tokens must be at least 1")
    try:
        misses = 0
        for _ in range(_TRIES):
            ended = asyncio.run(
                order(args.base_url, args.model, args.say, args.fill, args.long_tokens)
            )
            if ended is None:
                print("a call did not have to wait; once more")
            elif ended == sorted(ended):
                return 0
            elif (misses := misses + 1) == _MISSES:
                return 1
            else:
                print("not in order; once more")
    except OpenAIError as error:
        print(f"{args.base_url} cannot be used: {error}", file=sys.stderr)
        return 2
    print("the calls never had to wait; --fill or --long-tokens must be larger", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
