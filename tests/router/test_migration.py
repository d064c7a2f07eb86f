"""Streams whose engine dies go on at another one, as if nothing had happened."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from hexgen_vllm.testing import ManualClock, fake_tokens
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.fake_settings import FaultKind
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand

COMPLETIONS = "/v1/completions"
PATHS = (CHAT, COMPLETIONS)
# Of 1,000 requests every one may lose its engine several times.
OPTIONS: dict[str, Any] = {
    "migration_limit": 8,
    "disable_circuit_breaker": True,
    "retry_budget_burst": 1e6,
    "retry_max_retries": 1000,
}


def chunks(text: str) -> list[dict[str, Any]]:
    """Return what the events of a stream say, without its last one."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def read(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a client makes of a stream."""
    found: dict[str, Any] = {"text": "", "roles": 0, "reasons": [], "usage": None, "counts": []}
    for event in events:
        if not event["choices"]:
            found["usage"] = event["usage"]
            continue
        (choice,) = event["choices"]
        delta = choice.get("delta", {})
        found["roles"] += "role" in delta
        found["text"] += choice.get("text") or delta.get("content") or ""
        if choice["finish_reason"] is not None:
            found["reasons"].append((choice["finish_reason"], choice["stop_reason"]))
        assert choice.get("token_ids") is event.get("prompt_token_ids") is None
        assert choice.get("prompt_token_ids") is None
        found["counts"].append((event.get("usage") or {}).get("completion_tokens"))
    found["names"] = len({(e["id"], e["object"], e["created"], e["model"]) for e in events})
    found["counted"] = found["counts"] == [None] * len(found["counts"])
    found["last"] = found.pop("counts")[-1]
    return found


def expected(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return what an engine that does not die says."""
    stream = b"".join(fake_tokens.events(path, body, "x", (1,))).decode()
    return read(chunks(stream))


def a_body(stand: Stand, path: str, rng: random.Random) -> dict[str, Any]:
    """Return some request that is decoded greedily."""
    prompt = f"question {rng.random()} über 漢字"
    body = stand.body(path, stream=True, temperature=0)
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt if rng.random() < 0.7 else list(prompt.encode())
    body["max_tokens"] = rng.choice((5, 30, 200, 200))
    if rng.random() < 0.2:
        del body["max_tokens"]
    if rng.random() < 0.6:
        more = {"continuous_usage_stats": True} if rng.random() < 0.5 else {}
        body["stream_options"] = {"include_usage": True, **more}
    if rng.random() < 0.4:
        body["stop"] = rng.choice(("漢", ["é\n", "🙂👍k"], ["ab", "cd", "ef", "01"], ["3 3 3 3 3"]))
        body["include_stop_str_in_output"] = rng.random() < 0.5
    return body


def faults_of(stand: Stand) -> deque[Fault]:
    """Return a list of faults of which each meets the next request to any engine."""
    faults: deque[Fault] = deque()
    for engine in stand.engines:
        engine.faults = faults
    return faults


KINDS: tuple[FaultKind, ...] = ("reset", "close", "half", "cut", "garbage")


async def test_two_hundred_deaths_show_nowhere() -> None:
    """Whatever is asked for, wherever the stream breaks, and however often."""
    rng = random.Random(7)
    sizes = ((1,), (1, 2, 1, 3), (4, 1, 1), (5,))
    engines = [FakeSettings(event_tokens=one) for one in sizes]
    async with open_stand(*engines, policy="round_robin", **OPTIONS) as stand:
        book, faults = stand.context.ledger.migrations, faults_of(stand)
        calls = 0
        while book.total() < 200:
            faults.extend(Fault(rng.choice(KINDS), rng.randrange(1, 40)) for _ in range(6))
            bodies = [(path, a_body(stand, path, rng)) for path in PATHS * 4]
            calls += len(bodies)
            answers = await asyncio.gather(*(answer(stand, *one) for one in bodies))
            for (path, body), said in zip(bodies, answers, strict=True):
                assert read(chunks(said)) == expected(path, body), (path, body)
            assert book["closed"] + book["continued"] == book.total(), book
            faults.clear()
        assert stand.context.ledger.answered() == calls
        stand.assert_settled()


async def answer(stand: Stand, path: str, body: dict[str, Any]) -> str:
    async with stand.client.post(stand.router.url + path, json=body) as answered:
        return str(await answered.text())


@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_goes_on_wherever_it_broke(path: str) -> None:
    """At every event of it, also in the middle of a character and before its last events."""
    fake = FakeSettings(event_tokens=(1, 2))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        body = stand.body(path, stream=True, max_tokens=60, temperature=0)
        body["stream_options"] = {"include_usage": True}
        faults = faults_of(stand)
        whole = len(list(fake_tokens.events(path, body, "x", (1, 2))))
        assert whole > 20
        for after in range(1, whole):
            faults.append(Fault("reset", after))
            said = await answer(stand, path, body)
            assert read(chunks(said)) == expected(path, body), after
        stand.assert_settled()


async def test_usage_and_length_are_those_of_the_whole_answer() -> None:
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        stand.engines[0].faults.append(Fault("reset", 9))
        body = stand.body(stream=True, max_tokens=20, stream_options={"include_usage": True})
        said = read(chunks(await answer(stand, CHAT, body)))
        prompt = len(fake_tokens.prompt_ids(CHAT, body))
        assert said["usage"]["prompt_tokens"] == prompt
        assert said["usage"]["completion_tokens"] == 20
        first, rest = (engine.received[0] for engine in stand.engines)
        assert (first.path, rest.path) == (CHAT, COMPLETIONS)
        asked = json.loads(rest.body)
        assert asked["max_tokens"] == 20 - 8  # the role is no token
        assert len(asked["prompt"]) == prompt + 8
        assert asked["model"] == "tiny"
        stand.assert_settled()


async def test_engines_that_say_that_they_failed_are_left() -> None:
    """vLLM's server says in the stream that the process behind it has died."""
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        error = {"message": "EngineCore encountered an issue.", "type": "InternalServerError",
                 "param": None, "code": 500}  # fmt: skip
        died = f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n".encode()
        usual = fake_tokens.events
        dies = iter((True, False))

        def events(*args: Any) -> Any:
            whole = list(usual(*args))
            if next(dies):
                whole = [*whole[:5], whole[5] + died]
            return iter(whole)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fake_tokens, "events", events)
            body = stand.body(stream=True, max_tokens=30, temperature=0)
            said = await answer(stand, CHAT, body)
        assert read(chunks(said)) == expected(CHAT, body)
        assert stand.context.ledger.migrations["continued"] == 1
        stand.assert_settled()


CANNOT: dict[str, dict[str, Any]] = {
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "log probabilities": {"logprobs": True},
    "several choices": {"n": 2},
    "structured output": {"response_format": {"type": "json_object"}},
    "a grammar": {"structured_outputs": {"regex": "a+"}},
    "penalty of what was said": {"frequency_penalty": 0.5},
    "the other penalty": {"presence_penalty": 0.1},
    "a seed": {"seed": 3},
    "bad words": {"bad_words": ["x"]},
    "what nobody knows": {"new_field": {"a": 1}},
    "a picture": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
            }
        ]
    },
}


@pytest.mark.parametrize("what", CANNOT)
async def test_what_cannot_go_on_ends_as_without_the_option(what: str) -> None:
    """The engine gets the client's bytes, and a break is an error event."""
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        stand.engines[0].faults.append(Fault("reset", 5))
        body = stand.body(**{"stream": True, **CANNOT[what]})
        said = await answer(stand, CHAT, body)
        (received,) = stand.received()
        assert json.loads(received.body) == body
        last = json.loads(said.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["code"] == "engine-lost"
        assert "[DONE]" not in said
        assert stand.context.ledger.migrations.total() == 0
        stand.assert_settled()


async def broken(stand: Stand, **more: Any) -> str:
    """Return the code of the error event that ends a stream."""
    said = await answer(stand, CHAT, stand.body(**{"stream": True, "max_tokens": 40, **more}))
    last = json.loads(said.split("\n\n")[-2].removeprefix("data: "))
    assert said.count('"error"') == 1
    return str(last["error"]["code"])


async def test_it_is_off_by_default() -> None:
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("reset", 5))
        assert await broken(stand) == "engine-lost"
        (received,) = stand.received()
        assert "return_token_ids" not in json.loads(received.body)
        assert stand.context.ledger.migrations.total() == 0


async def test_it_happens_so_often_and_no_more() -> None:
    fake = FakeSettings(event_tokens=(1,))
    options = {**OPTIONS, "migration_limit": 2}
    async with open_stand(fake, fake, fake, fake, policy="round_robin", **options) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("reset", 4))
        assert await broken(stand) == "engine-lost"
        assert len(stand.received()) == 3
        book = stand.context.ledger.migrations
        assert (book["continued"], book["limit"]) == (2, 1)
        stand.assert_settled()


async def test_retries_that_are_off_are_off_for_streams_too() -> None:
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake, **{**OPTIONS, "disable_retries": True}) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("reset", 4))
        assert await broken(stand) == "engine-lost"
        assert stand.context.ledger.migrations["limit"] == 1


async def test_nobody_goes_on_after_the_deadline() -> None:
    fake, clock = FakeSettings(event_tokens=(1,)), ManualClock()
    async with open_stand(fake, fake, clock=clock, **OPTIONS) as stand:
        for engine in stand.engines:
            engine.fault = Fault("hang", 5)
        headers = {"x-hexgen-workflow-deadline-ms": "5000"}
        body = stand.body(stream=True, max_tokens=40)
        call = stand.client.post(stand.router.url + CHAT, json=body, headers=headers)
        answering = await call.__aenter__()
        await stand.until(lambda: sum(engine.steps for engine in stand.engines) >= 5)
        clock.advance(6.0)
        for engine in stand.engines:
            await engine.stop()
        said = await answering.text()
        answering.close()
        assert '"code": "engine-lost"' in said
        assert stand.context.ledger.migrations["late"] == 1
        stand.assert_settled()


async def test_one_engine_that_is_alone_ends_the_stream() -> None:
    async with open_stand(FakeSettings(event_tokens=(1,)), **OPTIONS) as stand:
        stand.engines[0].faults.append(Fault("reset", 4))
        assert await broken(stand) == "engine-lost"
        assert stand.context.ledger.migrations["no-engine"] == 1
        stand.assert_settled()


async def test_engines_that_tell_no_token_ids_are_not_gone_on_from() -> None:
    """They are asked, and say nothing; nor do clients see more than they would."""
    async with open_stand(FakeSettings(), FakeSettings(), **OPTIONS) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("reset", 4))
        assert await broken(stand) == "engine-lost"
        assert stand.context.ledger.migrations["impossible"] == 1
        for engine in stand.engines:
            engine.faults.clear()
        said = await answer(stand, CHAT, stand.body(stream=True, max_tokens=5))
        assert " t4" in said
        stand.assert_settled()


async def test_no_counts_are_made_up() -> None:
    """An engine that tells no token ids goes between its last token and the usage."""
    async with open_stand(FakeSettings(), FakeSettings(), **OPTIONS) as stand:
        faults_of(stand).extend((Fault("reset", 6), Fault("reset", 6)))
        assert await broken(stand, max_tokens=5, stream_options={"include_usage": True}) == (
            "engine-lost"
        )
        said = await answer(stand, CHAT, stand.body(stream=True, max_tokens=5))
        assert said.endswith("data: [DONE]\n\n")
        book = stand.context.ledger.migrations
        assert (book["impossible"], book["closed"]) == (1, 1)
        stand.assert_settled()


async def test_an_answer_that_would_not_be_the_same_is_not_mended() -> None:
    """Text that the client has must come again, letter by letter, where it is made again."""
    fake = FakeSettings(event_tokens=(3,))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        stand.engines[0].faults.append(Fault("reset", 6))
        usual, made = fake_tokens.tokens, itertools.count()

        def tokens(prompt: Sequence[int]) -> Any:
            return usual(prompt if next(made) == 0 else [*prompt, 65])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fake_tokens, "tokens", tokens)
            assert await broken(stand, temperature=0) == "engine-lost"
        stand.assert_settled()


async def test_sampled_answers_go_on_after_a_token_that_is_known_whole() -> None:
    """Nothing is made again that the client has seen, so that nothing need be the same."""
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        faults = faults_of(stand)
        for after in range(2, 30):
            faults.append(Fault("reset", after))
            body = stand.body(stream=True, max_tokens=40, temperature=0.7, top_p=0.9)
            assert read(chunks(await answer(stand, CHAT, body))) == expected(CHAT, body)
        assert stand.context.ledger.migrations["impossible"] == 0
        stand.assert_settled()


async def test_books_logs_and_explain_tell_of_it(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeSettings(event_tokens=(1,))
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        stand.engines[0].faults.append(Fault("reset", 9))
        headers = {"x-hexgen-workflow-id": "w1"}
        with caplog.at_level("DEBUG", logger="hexgen_vllm.router.call"):
            async with stand.post(
                stream=True, max_tokens=20, temperature=0, headers=headers
            ) as said:
                assert said.headers["x-hexgen-engine"] == "engine-0"
                await said.text()
        assert any("migrations=1" in record.getMessage() for record in caplog.records)
        async with stand.get("/explain?session_id=w1") as page:
            (call,) = (await page.json())["calls"]
        assert (call["migrations"], call["tries"], call["engine"]) == (1, 2, "engine-1")
        assert call["output_tokens"] == 20
        async with stand.get("/metrics") as page:
            said = await page.text()
        assert 'hexgen_router_migrations_total{outcome="continued"} 1.0' in said
        assert 'hexgen_router_migrations_total{outcome="limit"} 0.0' in said


async def test_all_streams_of_an_engine_that_is_gone_go_on() -> None:
    """Connections break at once, nobody listens there any more, and it may come back."""
    fake = FakeSettings(event_tokens=(1, 2), step_s=0.002)
    async with open_stand(fake, fake, policy="round_robin", **OPTIONS) as stand:
        for dies in stand.engines:
            bodies = [
                stand.body(path, stream=True, max_tokens=60, temperature=0, user=str(i))
                for i, path in enumerate(PATHS * 4)
            ]
            calls = [
                asyncio.ensure_future(answer(stand, path, body))
                for path, body in zip(PATHS * 4, bodies, strict=True)
            ]
            steps = dies.steps
            while dies.steps <= steps + 8:
                await asyncio.sleep(0.002)
            await dies.stop()
            for path, body, call in zip(PATHS * 4, bodies, calls, strict=True):
                assert read(chunks(await call)) == expected(path, body)
            await dies.start()
            await stand.all_ready()
        assert stand.context.ledger.migrations["continued"] >= 2
        stand.assert_settled()


async def test_an_engine_that_falls_silent_is_left() -> None:
    """Its connection stays open; the answer is given up, and another engine goes on."""
    fake, clock = FakeSettings(event_tokens=(1,)), ManualClock()
    options = {**OPTIONS, "stream_stall_timeout_secs": 20.0}
    async with open_stand(fake, fake, clock=clock, policy="round_robin", **options) as stand:
        faults_of(stand).append(Fault("hang", 6))
        body = stand.body(stream=True, max_tokens=40, temperature=0)
        call = asyncio.ensure_future(answer(stand, CHAT, body))
        await stand.until(lambda: sum(engine.steps for engine in stand.engines) >= 6)
        while not call.done():
            stand.context.tick()
            clock.advance(5.0)
            await asyncio.sleep(0.005)
        assert read(chunks(await call)) == expected(CHAT, body)
        assert stand.context.ledger.migrations["continued"] == 1
        stand.assert_settled()
