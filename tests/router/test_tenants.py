"""What a client can do to others, at most: nothing that its key does not let it do."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.claims import Ceiling
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.ports import free_ports
from hexgen_vllm.router.metrics import without_tenants
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.tenants import read_keys
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand

FILE = f"""
keys:
  - {{key: sk-a, tenant: a}}
  - {{key-sha256: {hashlib.sha256(b"sk-b").hexdigest()}, tenant: b, max-priority: interactive,
      min-deadline-ms: 5000, weight: 2}}
  - {{key: sk-gate, tenant: gate, tenants: [web, mobile], classes: [bulk, system]}}
  - {{key: sk-any, tenant: any, tenants: ["*"], max-priority: 1000}}
  - {{key: sk-root, tenant: root, admin: true}}
"""
STATS = {"version": 1}
WIDE = ("sk-a", "sk-b", "sk-gate", "sk-any")
MINE = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "50000"}


def bearer(key: str, **more: str) -> dict[str, str]:
    said = {name.replace("_", "-"): value for name, value in more.items()}
    return {"Authorization": f"Bearer {key}", **said}


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    return str(path)


@asynccontextmanager
async def opened(*engines: FakeSettings, **options: Any) -> AsyncIterator[Stand]:
    async with open_stand(*(engines or (FakeSettings(stats=STATS),)), **options) as stand:
        yield stand


async def call(stand: Stand, headers: dict[str, str], **body: Any) -> dict[str, str]:
    """Make a call; return the headers that the engine got."""
    async with stand.post(headers=headers, **body) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
    return {name.lower(): value for name, value in stand.received()[-1].headers.items()}


def run(stand: Stand, name: str) -> WorkflowRun | None:
    return stand.context.service.coordinator.workflows.get(name)


async def finish(stand: Stand, headers: dict[str, str], session: str = "w") -> bool:
    url = f"{stand.router.url}/finish_session"
    query = {"session_id": session}
    async with stand.client.post(url, params=query, headers=headers) as answer:
        assert answer.status == 200
        return bool((await answer.json())["finished"])


@pytest.mark.parametrize("other", ["sk-b", "sk-gate"])
async def test_nobody_touches_a_workflow_of_another_tenant(keys: str, other: str) -> None:
    async with opened(api_keys=keys) as stand:
        await call(stand, bearer("sk-a", **MINE))
        mine = run(stand, "w of a")
        assert mine is not None
        deadline_s = mine.deadline_s
        for header in ("x-hexgen-tenant", "x-tenant-id", "x-llm-d-inference-fairness-id"):
            theirs = {**MINE, "x-hexgen-workflow-deadline-ms": "6000", header: "a"}
            await call(stand, bearer(other, **{**theirs, "x-hexgen-workflow-final": "1"}))
            assert not await finish(stand, bearer(other, **{header: "a"}))
        assert run(stand, "w of a") is mine
        assert mine.deadline_s == deadline_s
        assert await finish(stand, bearer("sk-a"))
        assert run(stand, "w of a") is None


@pytest.mark.parametrize("name", ["x-session-id", "x-claude-code-session-id", "session_id"])
async def test_sessions_are_their_tenants_too(keys: str, name: str) -> None:
    async with opened(api_keys=keys) as stand:
        seen = set()
        for key in ("sk-a", "sk-b"):
            got = await call(stand, {**bearer(key), name: "s"})
            assert got["x-session-id"] == got["x-hexgen-workflow-id"]
            seen.add(got["x-session-id"])
        assert len(seen) == 2, "engines do not take them for one"
        final = {**bearer("sk-b"), name: "s", "x-dynamo-session-final": "true"}
        await call(stand, final)
        assert run(stand, "s of a") is not None
        assert run(stand, "s of b") is None


async def test_who_may_act_for_a_tenant_is_that_tenant(keys: str) -> None:
    async with opened(api_keys=keys) as stand:
        for key, said, tenant in (
            ("sk-gate", "web", "web"), ("sk-gate", "a", "gate"), ("sk-any", "a", "a"),
            ("sk-a", "b", "a"),
        ):  # fmt: skip
            got = await call(stand, bearer(key, x_hexgen_tenant=said, **MINE))
            assert got["x-hexgen-tenant"] == tenant
        assert stand.context.ledger.clamped["tenant"] == 2
        assert await finish(stand, bearer("sk-any", x_hexgen_tenant="web"))
        assert run(stand, "w of gate") is not None


async def test_the_admin_ends_any_workflow(keys: str) -> None:
    async with opened(api_keys=keys, admin_api_key=("root",)) as stand:
        await call(stand, bearer("sk-a", **MINE))
        assert not await finish(stand, bearer("root"))
        assert await finish(stand, bearer("root", x_hexgen_tenant="a"))


@pytest.mark.parametrize(
    ("key", "claimed", "counts"),
    [("sk-a", 1000, 0), ("sk-b", 1000, 1), ("sk-gate", 7, 2), ("sk-any", 7, 7), ("sk-a", -5, -5)],
)
async def test_priorities_are_held_to_their_ceiling(
    keys: str, key: str, claimed: int, counts: int
) -> None:
    for engine in (FakeSettings(stats=STATS), FakeSettings()):
        async with opened(engine, api_keys=keys) as stand:
            for headers, body in (
                ({"X-Vllm-Priority": str(-claimed)}, {}),
                ({"X-Vllm-Priority": str(-claimed)}, {"priority": -(2**31)}),
                ({}, {"priority": -claimed}),
            ):
                got = await call(stand, {**bearer(key), **headers}, **body)
                assert got.get("x-vllm-priority", str(-counts)) == str(-counts)
                entry = stand.context.ledger.clamped["priority"]
                assert (entry > 0) == (claimed > counts)


async def test_a_low_priority_hides_no_high_one(keys: str) -> None:
    """What is read first must not let another word reach the engine as it is."""
    async with opened(FakeSettings(), api_keys=keys) as stand:
        context = {"agentic_context": {"priority": -1}}
        got = await call(stand, bearer("sk-a", X_Vllm_Priority="-999"), vllm_xargs=context)
        assert got["x-vllm-priority"] == "1"


async def test_deadlines_are_held_to_their_floor(keys: str) -> None:
    async with opened(api_keys=keys) as stand:
        for claim in ("0.001", "1", "4999"):
            said = {"x-hexgen-workflow-id": f"w{claim}", "x-hexgen-workflow-deadline-ms": claim}
            got = await call(stand, bearer("sk-b", **said))
            assert float(got["x-hexgen-workflow-deadline-ms"]) > 4000
        assert stand.context.ledger.clamped["deadline"] == 3
        timeout = {"x-litellm-timeout": "0.01", "x-session-id": "s"}
        got = await call(stand, bearer("sk-b", **timeout))
        assert float(got["x-hexgen-workflow-deadline-ms"]) > 4000


async def test_ceilings_hold_without_keys_too() -> None:
    async with opened(max_priority=0, min_deadline_ms=5000.0) as stand:
        said = {"x-hexgen-workflow-deadline-ms": "1", "X-Vllm-Priority": "-9"}
        got = await call(stand, said)
        assert float(got["x-hexgen-workflow-deadline-ms"]) > 4000
        assert got["x-vllm-priority"] == "0"
        async with stand.get("/metrics") as answer:
            text = await answer.text()
        for claim in ("deadline", "priority"):
            assert f'hexgen_router_clamped_claims_total{{claim="{claim}"}} 1.0' in text


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e18", "-2147483648"])
async def test_deadlines_that_are_none_are_refused(stand: Stand, value: str) -> None:
    async with stand.post(headers={"x-hexgen-workflow-deadline-ms": value}) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == "x-hexgen-workflow-deadline-ms"


async def test_several_plain_keys_are_as_many_tenants() -> None:
    async with opened(api_key=("one", "two")) as stand:
        tenants = set()
        for key in ("one", "two"):
            got = await call(
                stand, bearer(key, x_hexgen_tenant="vip", X_Vllm_Priority="-9", **MINE)
            )
            tenants.add(got["x-hexgen-tenant"])
            assert got["x-vllm-priority"] == "0"
        assert len(tenants) == 2
        assert "vip" not in tenants
        assert len(stand.context.service.coordinator.workflows) == 2


async def test_one_plain_key_is_one_tenant_as_before() -> None:
    async with opened(api_key=("one",)) as stand:
        got = await call(stand, bearer("one", X_Vllm_Priority="-9", **MINE))
        assert (got["x-hexgen-workflow-id"], got["x-vllm-priority"]) == ("w", "-9")
        for path in ("/scheduling/diagnostics", "/ui/data"):
            async with stand.client.get(stand.router.url + path, headers=bearer("one")) as answer:
                assert answer.status == 200


async def test_what_shows_all_tenants_needs_an_admin_key(keys: str) -> None:
    for options, refused in (({"api_keys": keys}, 401), ({"api_key": ("sk-a", "sk-b")}, 403)):
        async with opened(tune="suggest", **options) as stand:
            await call(stand, bearer("sk-b", **MINE))
            for path in ("/scheduling/diagnostics", "/ui/data", "/tuning/recent"):
                url = stand.router.url + path
                async with stand.client.get(url, headers=bearer("sk-a")) as answer:
                    assert answer.status == refused, path
                if refused == 401:
                    async with stand.client.get(url, headers=bearer("sk-root")) as answer:
                        assert answer.status == 200, path
            for path in ("/v1/models", "/workers", "/load"):
                url = stand.router.url + path
                async with stand.client.get(url, headers=bearer("sk-a")) as answer:
                    assert answer.status == 200, path
                    assert '"b"' not in await answer.text()


async def test_open_metrics_name_no_tenant(keys: str) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    async with opened(api_keys=keys, prometheus_port=port) as stand:
        said = {**MINE, "x-hexgen-workflow-type": "secret-type", "x-hexgen-workflow-final": "1"}
        await call(stand, bearer("sk-gate", x_hexgen_tenant="mobile", **said))
        shown = {}
        for name, url, headers in (
            ("anybody", f"{stand.router.url}/metrics", {}),
            ("client", f"{stand.router.url}/metrics", bearer("sk-a")),
            ("admin", f"{stand.router.url}/metrics", bearer("sk-root")),
            ("scraper", f"http://127.0.0.1:{port}/metrics", {}),
        ):
            async with stand.client.get(url, headers=headers) as answer:
                shown[name] = await answer.text()
        for name, text in shown.items():
            told = name in ("admin", "scraper")
            assert ("mobile" in text) == ("secret-type" in text) == told, name
            assert "hexgen_router_calls_total" in text


def test_only_samples_are_left_out() -> None:
    text = (
        b'# TYPE a counter\na{tenant="x"} 1\na{kind="y",type="z"} 1\na{kind="type=\\"w"} 1\nb 2\n'
    )
    assert without_tenants(text) == b'# TYPE a counter\na{kind="type=\\"w"} 1\nb 2\n'


async def test_unknown_keys_are_nobody(keys: str) -> None:
    async with opened(api_keys=keys) as stand:
        digest = hashlib.sha256(b"sk-b").hexdigest()
        for headers in ({}, bearer("sk"), bearer("sk-a "), bearer(digest), {"x-api-key": "nope"}):
            async with stand.post(headers=headers) as answer:
                known = headers == bearer("sk-a ")  # blanks around a key are none of it
                assert answer.status == (200 if known else 401)
        async with stand.post(headers={"x-api-key": "sk-b"}) as answer:
            assert answer.status == 200


async def test_an_admin_key_of_the_file_opens_admin_routes(keys: str) -> None:
    async with opened(api_keys=keys) as stand:
        url = f"{stand.router.url}/list_workers"
        for key in (*WIDE, "sk-root"):
            async with stand.client.get(url, headers=bearer(key)) as answer:
                assert answer.status == (200 if key == "sk-root" else 401)


@pytest.mark.parametrize("session", ["lone call-0", "w of a", "w\tof a"])
async def test_no_id_names_what_is_not_the_clients(keys: str, session: str) -> None:
    async with opened(api_keys=keys) as stand:
        await call(stand, bearer("sk-a", **MINE))
        assert not await finish(stand, bearer("sk-b"), session)
        assert run(stand, "w of a") is not None


async def test_weights_of_the_file_are_shares(keys: str) -> None:
    async with opened(api_keys=keys, dispatch={"tenant_weights": {"a": 0.5}}) as stand:
        assert stand.context.service.coordinator.options.tenant_weights == {"a": 0.5, "b": 2.0}


def test_the_file_is_read_whole(keys: str) -> None:
    found = [one.client() for one in read_keys(Path(keys)).keys]
    assert [one.tenant for one in found] == ["a", "b", "gate", "any", "root"]
    assert found[0].ceiling == Ceiling(0, 0.0)
    assert found[1].ceiling == Ceiling(1, 5.0)
    assert found[2].ceiling == Ceiling(2, 0.0)
    assert [one.admin for one in found] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1"),
        ("keys: 7\n", "line 1: keys: "),
        ("keys:\n- {key: SECRET}\n", "line 2: keys[0]: .*tenant"),
        ("keys:\n- {key: SECRET, tenant: a}\n- {tenant: a}\n", "line 3: keys[1]: .*key-sha256"),
        ("keys:\n- {key: SECRET, tenant: a, max-prio: 3}\n", "line 2: keys[0]: .*max-prio"),
        ("keys:\n- {key: SECRET, tenant: 'a b'}\n", "line 2: .*tenant"),
        ("keys:\n- {key: SECRET, tenant: a, tenants: [a, 'b c']}\n", "line 2: .*tenant"),
        ("keys:\n- {key: SECRET, tenant: a, max-priority: vip}\n", "line 2: .*'vip'"),
        (
            "keys:\n- {key: SECRET, tenant: a, max-priority: 5000000000000000000}\n",
            "line 2: .*max-priority",
        ),
        ("keys:\n- {key: SECRET, tenant: a, classes: [vip]}\n", "line 2: .*'vip'"),
        ("keys:\n- {key: SECRET, tenant: a, weight: 0}\n", "line 2: .*weight"),
        ("keys:\n- {key: SECRET, tenant: a, weight: .nan}\n", "line 2: .*weight"),
        ("keys:\n- {key: SECRET, tenant: a, min-deadline-ms: -1}\n", "line 2: .*min-deadline-ms"),
        ("keys:\n- {key: SECRET, tenant: a, admin: maybe}\n", "line 2: keys[0].admin: "),
        ("keys:\n- {key-sha256: SECRET, tenant: a}\n", "line 2: .*64 hexadecimal"),
        ("keys:\n- {key: '', tenant: a}\n", "line 2: .*key"),
        ("keys:\n- {key: SECRET, tenant: a}\n- {key: SECRET, tenant: b}\n", "line 3: .*twice"),
        (
            "keys:\n- {key: SECRET, tenant: a, weight: 1}\n- {key: x, tenant: a, weight: 2}\n",
            "line 3: .*weights",
        ),
    ],
)
def test_mistakes_are_named_and_keys_are_not(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    pattern = said.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ConfigError, match=pattern) as caught:
        RouterOptions(api_keys=str(path))
    assert "SECRET" not in str(caught.value)


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        RouterOptions(api_keys=str(tmp_path / "none"))


async def test_junk_claims_leave_the_router_serving(keys: str) -> None:
    async with opened(api_keys=keys) as stand:
        for headers in (
            {"X-Vllm-Priority": "-99999999999999999999"},
            {"X-Vllm-Priority": "nan"},
            {"x-hexgen-stages-left": "2147483647", **MINE},
            {"x-hexgen-expected-output-tokens": "2147483647", **MINE},
        ):
            await call(stand, {**bearer("sk-a"), **headers})
        assert stand.context.ledger.open == 0


async def test_who_calls_everything_interactive_gains_nothing_over_its_ceiling(
    tmp_path: Path,
) -> None:
    """Its calls are served in the order in which they are when it claims nothing."""
    path = tmp_path / "keys.yaml"
    path.write_text(
        "keys:\n"
        "  - {key: sk-greedy, tenant: greedy, max-priority: bulk, min-deadline-ms: 600000}\n"
        "  - {key: sk-honest, tenant: honest, max-priority: interactive}\n"
    )
    claims = {
        "x-hexgen-class": "interactive", "x-smg-priority": "system", "x-vllm-priority": "-9",
        "x-hexgen-tenant": "honest", "x-hexgen-workflow-deadline-ms": "1",
    }  # fmt: skip
    body = {"priority": -9, "service_tier": "priority", "max_tokens": 4, "ignore_eos": True}
    orders = []
    for claimed in (False, True):
        engine = FakeSettings(stats={**STATS, "max_num_seqs": 1}, slots=1, step_s=0.01)
        async with opened(engine, api_keys=str(path), dispatch={"hold_depth": 0}) as stand:

            async def greedy(i: int, claimed: bool = claimed, stand: Stand = stand) -> None:
                more = {**claims, "x-hexgen-workflow-id": f"g{i}"} if claimed else {}
                said = {**bearer("sk-greedy", **more), "x-request-id": f"g{i}"}
                await call(stand, said, **(body if claimed else {"max_tokens": 4}))

            async def honest(i: int, stand: Stand = stand) -> None:
                mine = {"x-hexgen-workflow-id": f"h{i}", "x-hexgen-workflow-deadline-ms": "5000"}
                said = {**bearer("sk-honest", **mine), "x-request-id": f"h{i}"}
                await call(stand, said, max_tokens=4)

            load = [asyncio.create_task(greedy(i)) for i in range(6)]
            await stand.until(lambda stand=stand: stand.context.service.waiting == 5)
            load += [asyncio.create_task(honest(i)) for i in range(3)]
            await asyncio.gather(*load)
            sent = [one.headers for one in stand.received() if one.method == "POST"]
            orders.append([one["x-request-id"][0] for one in sent])  # whose
            for one in sent:
                if one["x-request-id"].startswith("g") and claimed:
                    assert one["x-hexgen-tenant"] == "greedy"
                    assert "x-hexgen-class" not in one
                    assert int(one["x-vllm-priority"]) >= 1
            if claimed:
                assert stand.context.ledger.clamped["class"] == 6
    assert orders[0] == orders[1]
    assert orders[0][1:4] == ["h", "h", "h"]


async def test_no_tenant_teaches_what_to_expect_of_anothers_calls(keys: str) -> None:
    typed = {"x-hexgen-workflow-type": "sql", "x-hexgen-stage": "draft"}
    async with opened(FakeSettings(stats=STATS, default_tokens=400), api_keys=keys) as stand:
        for _ in range(9):
            await call(stand, {**bearer("sk-b"), **typed}, max_tokens=800)
        told = {}
        for key in ("sk-a", "sk-b", "sk-gate"):
            tenant = {"x-hexgen-tenant": "web"} if key == "sk-gate" else {}
            told[key] = await call(stand, {**bearer(key), **typed, **tenant}, max_tokens=800)
        default = stand.context.service.coordinator.options.default_output_tokens
        expected = [int(one["x-hexgen-expected-output-tokens"]) for one in told.values()]
        assert expected == [default, 400, default]
        types = [one["x-hexgen-workflow-type"] for one in told.values()]
        assert types == ["sql:a", "sql:b", "sql:web"]


async def test_a_type_that_is_too_long_with_its_tenant_still_has_a_name(keys: str) -> None:
    typed = {"x-hexgen-workflow-type": "t" * 63}
    async with opened(api_keys=keys) as stand:
        names = [
            (await call(stand, {**bearer(key), **typed}))["x-hexgen-workflow-type"]
            for key in ("sk-a", "sk-b")
        ]
        assert len(set(names)) == 2
        assert all(len(name) <= 64 for name in names)


async def test_without_keys_of_several_all_learn_from_all() -> None:
    typed = {"x-hexgen-workflow-type": "sql", "x-hexgen-stage": "draft"}
    settings = FakeSettings(stats=STATS, default_tokens=400)
    async with opened(settings, api_key=("sk-one",)) as stand:
        for tenant in ("a",) * 9 + ("b",):
            said = {**bearer("sk-one"), **typed, "x-hexgen-tenant": tenant}
            told = await call(stand, said, max_tokens=800)
        assert told["x-hexgen-expected-output-tokens"] == "400"
        assert told["x-hexgen-workflow-type"] == "sql"
