"""Where the time of workflows went: accounts, their log lines, the page that tells of one."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm import explain
from hexgen_vllm.cli import main
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import Parser
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.recent import RecentCall, RecentWorkflow, parse
from hexgen_vllm.router.calls.accounts import (
    PARTS,
    REASONS,
    Accounts,
    CallAccount,
    WorkflowAccount,
)
from hexgen_vllm.router.observe.logs import formatter
from hexgen_vllm.testing.fake_server import Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import NO_DEADLINE, Call


def call(
    came_s: float,
    ended_s: float,
    *,
    placed_s: float | None = None,
    sent_s: float | None = None,
    first_token_s: float | None = None,
    stage: str = "s",
    **more: Any,
) -> CallAccount:
    placed_s = came_s if placed_s is None else placed_s
    one = CallAccount(
        request_id="r",
        stage=stage,
        came_s=came_s,
        placed_s=placed_s,
        sent_s=placed_s if sent_s is None else sent_s,
        first_token_s=first_token_s,
        ended_s=ended_s,
        outcome="answered",
        engine="a",
        reason="turn",
        tries=1,
        slack_s=None,
        prompt_tokens=7,
        cached_tokens=None,
        output_tokens=3,
        tenant="t",
        expected_prompt_tokens=100,
        expected_cached_tokens=70,
    )
    return replace(one, **more)


def workflow(*calls: CallAccount, deadline_s: float = NO_DEADLINE) -> WorkflowAccount:
    last_s = max(one.ended_s for one in calls)
    run = WorkflowRun("w", "t", calls[0].came_s, deadline_s, last_seen_s=last_s)
    return WorkflowAccount.of(run, calls, ended=True)


def test_a_call_is_divided_into_what_it_waited_for() -> None:
    one = call(10.0, 20.0, placed_s=11.0, sent_s=13.0, first_token_s=16.0)
    assert one.parts() == {"queue": 1.0, "retries": 2.0, "prefill": 3.0, "decode": 4.0}
    assert call(0.0, 5.0, placed_s=1.0).parts() == {"queue": 1.0, "retries": 0.0, "engine": 4.0}


def test_a_first_token_of_a_try_that_failed_is_none_of_the_last() -> None:
    one = call(0.0, 9.0, placed_s=1.0, sent_s=5.0, first_token_s=3.0)
    assert one.parts() == {"queue": 1.0, "retries": 4.0, "engine": 4.0}


def test_the_path_is_of_the_calls_that_decided_and_its_parts_add_up() -> None:
    first = call(0.0, 4.0, placed_s=1.0, first_token_s=2.0)
    short = call(5.0, 6.0)
    long = call(5.0, 9.0, placed_s=7.0)
    last = call(9.5, 12.0)
    account = workflow(first, short, long, last, deadline_s=10.0)
    assert account.path() == [first, long, last]
    assert account.parts() == {
        "queue": 3.0, "retries": 0.0, "prefill": 1.0, "decode": 2.0, "engine": 4.5, "client": 1.5,
    }  # fmt: skip
    assert sum(account.parts().values()) == account.took_s == 12.0
    assert (account.outcome, account.slack_s) == ("late", -2.0)


def test_a_workflow_begins_when_its_first_call_came_however_late_that_is_noticed() -> None:
    calls = [call(1.0, 6.0, placed_s=4.0), call(6.5, 8.0)]
    run = WorkflowRun("w", "t", 3.5, NO_DEADLINE, last_seen_s=8.0)
    account = WorkflowAccount.of(run, calls, ended=True)
    assert account.took_s == sum(account.parts().values()) == 7.0


def test_calls_that_share_a_request_id_are_not_mistaken_for_each_other() -> None:
    view = workflow(call(0.0, 2.0), call(0.0, 5.0)).view()
    assert [one["on_path"] for one in view["calls"]] == [False, True]


def test_what_the_tuner_plays_again() -> None:
    first = call(10.0, 12.0, stage="plan", prompt_tokens=90, cached_tokens=64)
    second = call(12.5, 14.0, prompt_tokens=None)
    account = workflow(first, second, deadline_s=50.0)
    recorded = account.recorded()
    assert recorded == RecentWorkflow(
        "t",
        10.0,
        (RecentCall("plan", 0.0, 2.0, 90, 3, 64), RecentCall("s", 2.5, 1.5, 100, 3, 70)),
        tenant="t",
        deadline_s=40.0,
        latency_s=4.0,
    )
    assert parse([recorded.line()], "ring") == [recorded]


def test_a_workflow_that_an_answer_is_missing_in_did_not_finish() -> None:
    for lost in ({"outcome": "engine-lost"}, {"output_tokens": None}):
        recorded = workflow(call(0.0, 1.0), call(1.0, 2.0, **lost)).recorded()
        assert recorded is not None
        assert (recorded.latency_s, len(recorded.calls), recorded.deadline_s) == (None, 1, None)


def test_what_is_not_whole_is_not_played_again() -> None:
    assert workflow(*[call(0.0, 1.0)] * 256).recorded() is None
    assert WorkflowAccount.of(WorkflowRun("w", "t", 0.0), (), ended=True).recorded() is None


def test_a_workflow_that_is_ended_while_a_call_is_under_way_took_until_its_end() -> None:
    run = WorkflowRun("w", "t", 0.0, last_seen_s=1.0)
    recorded = WorkflowAccount.of(run, (call(0.0, 1.0), call(0.5, 3.0)), ended=True).recorded()
    assert recorded is not None
    assert recorded.latency_s == 3.0


def said(name: str, **more: Any) -> dict[str, str]:
    return {"x-hexgen-workflow-id": name, "x-hexgen-workflow-type": "sql", **more}


FINAL = {"x-hexgen-workflow-final": "1"}


async def test_the_router_says_where_the_time_went(stand: Stand) -> None:
    for more in ({"x-hexgen-stage": "link"}, {"x-hexgen-stage": "sql", **FINAL}):
        headers = said("w", **more, **{"x-request-id": more["x-hexgen-stage"] + "-1"})
        if not headers.keys() & FINAL:
            headers["x-hexgen-workflow-deadline-ms"] = "60000"
        async with stand.post(headers=headers, stream=more is not FINAL) as answer:
            await answer.read()
    async with stand.get("/explain?session_id=w") as answer:
        account = await answer.json()
    assert (account["outcome"], account["type"]) == ("on-time", "sql")
    assert [one["request_id"] for one in account["calls"]] == ["link-1", "sql-1"]
    assert all(one["why"] == REASONS["marginal_cost"] for one in account["calls"])
    assert account["parts"].keys() == set(PARTS)
    assert sum(account["parts"].values()) == pytest.approx(account["took_s"], abs=0.01)
    assert 0 < account["slack_s"] < account["deadline_s"] <= 60
    async with stand.get("/ui/data") as answer:
        shown = await answer.json()
    assert [(one["id"], one["outcome"]) for one in shown["recent"]] == [("w", "on-time")]
    assert [one["request"] for one in shown["decisions"]] == ["sql-1", "link-1"]
    (kind,) = shown["ended"]["types"]
    assert kind["took_median_s"] == pytest.approx(account["took_s"], abs=0.002)


async def test_an_open_workflow_and_an_unknown_one(stand: Stand) -> None:
    async with stand.post(headers=said("w")) as answer:
        await answer.read()
    async with stand.get("/explain?session_id=w") as answer:
        assert (await answer.json())["outcome"] == "open"
    for path, status in (("/explain?session_id=x", 404), ("/explain", 400)):
        async with stand.get(path) as answer:
            assert answer.status == status
            assert "error" in await answer.json()


async def test_failed_tries_are_told_apart(stand: Stand) -> None:
    stand.engines[0].fault = Fault("status", status=503)
    async with stand.post(headers=said("w", **FINAL)) as answer:
        await answer.read()
    async with stand.get("/explain?session_id=w") as answer:
        (one,) = (await answer.json())["calls"]
    assert one["tries"] == 2
    assert one["sent_s"] > one["placed_s"]


async def test_a_workflow_that_ends_before_its_last_call_is_booked_has_that_call(
    stand: Stand,
) -> None:
    for engine in stand.engines:
        engine.fault = Fault("status", status=503)
    async with stand.post(headers=said("w", **FINAL)) as answer:
        assert answer.status >= 500
    async with stand.get("/explain?session_id=w") as answer:
        account = await answer.json()
    assert account["outcome"] == "failed"
    assert [one["outcome"] for one in account["calls"]] == ["engine-busy"]
    assert not stand.context.metrics.accounts._open


def test_a_workflow_that_begins_anew_is_another_one() -> None:
    accounts = Accounts()
    accounts.call_began(Call("c1", "w", 0.0, 1), "r1")
    accounts.workflow_ended(WorkflowRun("w", "t", 0.0, last_seen_s=1.0))
    assert accounts.recent(9) == []
    accounts.call_began(Call("c2", "w", 2.0, 1), "r2")
    assert [one.ended_s for one in accounts.recent(9)] == [1.0]
    accounts.workflow_ended(WorkflowRun("w", "t", 2.0, last_seen_s=3.0))
    assert [one.ended_s for one in accounts.recent(9)] == [1.0]


async def test_nothing_stays_of_calls_that_no_workflow_has(stand: Stand) -> None:
    async with stand.post(model="nobody") as answer:
        assert answer.status == 404
    async with stand.post() as answer:
        await answer.read()
    accounts = stand.context.metrics.accounts
    assert accounts.recent(9) == []
    assert not accounts._open


def test_only_so_many_are_remembered() -> None:
    accounts = Accounts(most=3)
    for i in range(5):
        accounts.workflow_ended(WorkflowRun(f"w{i}", "t", 0.0, last_seen_s=1.0))
        accounts.call_began(Call(f"c{i}", f"v{i}", 0.0, 1), f"r{i}")
    assert [one.workflow_id for one in accounts.recent(9)] == ["w4", "w3", "w2"]
    assert accounts.of("w0", None) is None
    assert (accounts.request_of("c0"), accounts.request_of("c4")) == (None, "r4")


async def test_another_tenants_workflow_is_not_explained(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n- {tenant: a, key: ka}\n- {tenant: b, key: kb}\n")
    async with open_stand(api_keys=str(keys)) as stand:
        url = stand.router.url
        for key, status in (("ka", 200), ("kb", 404)):
            bearer = {"Authorization": f"Bearer {key}"}
            if key == "ka":
                sent = {**said("w", **FINAL), **bearer}
                async with stand.client.post(
                    f"{url}/v1/chat/completions", json=stand.body(), headers=sent
                ) as answer:
                    await answer.read()
            where = f"{url}/explain?session_id=w"
            async with stand.client.get(where, headers=bearer) as answer:
                assert answer.status == status


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_late_workflow_is_explained_from_the_log_alone(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "router.log"
    logger = logging.getLogger("hexgen_vllm.router.workflow")
    handler = logging.FileHandler(log)
    handler.setFormatter(formatter(form))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        accounts = Accounts()
        run = WorkflowRun("w", "sql", 0.0, 10.0, last_seen_s=12.0)
        accounts.call_began(Call("c", "w", 0.0, 1), "r")
        first = call(0.0, 4.0, placed_s=1.0, first_token_s=2.0, stage="link")
        of = accounts._open["w"]
        of.calls += [first, call(5.0, 12.0, placed_s=9.0, stage="sql")]
        of.under_way.clear()
        accounts.workflow_ended(run)
        (account,) = accounts.recent(1)
        accounts.workflow_ended(WorkflowRun("other", "sql", 0.0, 10.0, last_seen_s=2.0))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(log.read_text().splitlines()) == 4
    found, known = explain.from_log(log, "w"), account.view()
    for one in known["calls"]:
        del one["why"]
    assert found == known
    assert main(["explain", "w", "--log", str(log)]) == 0
    shown = capsys.readouterr().out
    assert "2.000 s too late" in shown
    assert "queue" in shown
    assert main(["explain", "other", "--log", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == []
    assert main(["explain", "nobody", "--log", str(log)]) == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--base-url", "http://127.0.0.1:9"), "no router answers"),
        (("--log", "/nowhere/x.log"), "cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(more: tuple[str, ...], words: str) -> None:
    parser = Parser()
    explain.add_arguments(parser)
    with pytest.raises(ConfigError, match=words) as caught:
        explain.main(parser.parse_args(["w", *more]))
    assert "\n" not in str(caught.value)
