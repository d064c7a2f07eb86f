"""The page at /ui: what it is made of, what it asks for, and what a browser makes of both."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hexgen_vllm.router.observe.ledger import OUTCOMES, PERIODS
from hexgen_vllm.router.status import overview
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from tests.router.browser import Tab, chromium, open_browser

HOSTILE = "<img/src=x/onerror=alert(1)>"
STATS: dict[str, Any] = {
    "cost": {"c0": 0.01, "c1": 0.001, "c2": 0.0, "p0": 0.0, "p1": 0.0001, "p2": 0.0},
    "running": 1, "waiting": 0, "kv_usage": 0.5, "kv_tokens": 4096, "max_num_seqs": 2,
    "fit_error": 0.07, "preemptions": {"displaced": 3},
}  # fmt: skip
needs_browser = pytest.mark.skipif(
    chromium() is None,
    reason="no Chromium is installed (Debian: apt-get install chromium); "
    "the page's contract is tested without one",
)


async def page(stand: Stand) -> tuple[str, dict[str, str]]:
    async with stand.get("/ui") as answer:
        assert answer.status == 200
        return await answer.text(), dict(answer.headers)


async def test_the_address_alone_leads_to_the_page() -> None:
    async with open_stand(api_key=("k",)) as stand, stand.get("/") as answer:
        assert answer.status == 200
        assert str(answer.url).endswith("/ui")


async def data(stand: Stand) -> dict[str, Any]:
    async with stand.get("/ui/data") as answer:
        assert answer.status == 200
        return json.loads(await answer.read(), parse_constant=pytest.fail)  # type: ignore[no-any-return]


def said(workflow: str, deadline_ms: float = 60_000, **more: str) -> dict[str, str]:
    """Return the headers of a call of a workflow."""
    return {
        "x-hexgen-workflow-id": workflow,
        "x-hexgen-workflow-type": "sql",
        "x-hexgen-stage": "draft",
        "x-hexgen-workflow-deadline-ms": str(deadline_ms),
        **more,
    }


async def answered(stand: Stand, headers: dict[str, str]) -> None:
    async with stand.post(headers=headers) as answer:
        await answer.read()


@asynccontextmanager
async def hanging(stand: Stand, *calls: dict[str, str]) -> AsyncIterator[None]:
    """Keep a call open for each of the given headers."""
    for engine in stand.engines:
        engine.fault = Fault("hang", 1)
    before = stand.context.ledger.open
    tasks = [asyncio.create_task(answered(stand, headers)) for headers in calls]
    await stand.until(lambda: stand.context.ledger.open == before + len(calls))
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


FINAL = {"x-hexgen-workflow-final": "1"}


async def test_the_page_is_whole_and_small(stand: Stand) -> None:
    html, headers = await page(stand)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(html.encode()) < 40_000
    assert not re.findall(r"(?:https?:)?//[a-z]", html), "nothing comes from elsewhere"
    assert not re.findall(r"\son\w+=|\sstyle=|innerHTML|insertAdjacentHTML|eval\(|Function\(", html)


async def test_only_its_own_script_and_style_may_run(stand: Stand) -> None:
    html, headers = await page(stand)
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        hashed = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert policy[directive] == " ".join(f"'sha256-{one}'" for one in hashed)
    assert headers["X-Frame-Options"] == "DENY"


async def test_the_script_finds_what_it_looks_for(stand: Stand) -> None:
    html, _ = await page(stand)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    script = html[html.index("<script>") :]
    used = set(re.findall(r'\$\("([\w-]+)"\)', script))
    for pair in re.findall(r'table\("([\w-]+)",.*"([\w-]+)"\)', script):
        used |= set(pair)
    used |= set(re.findall(r'(?:figure|bars)\("([\w-]+)"', script))
    used |= {f"ended-{outcome}" for outcome in OUTCOMES}
    assert len(used) > 20
    assert used <= set(ids)


async def test_the_script_reads_what_the_router_says() -> None:
    """Every field that the script names is there, in every state the router can be in."""
    async with open_stand(FakeSettings(stats=STATS), FakeSettings()) as stand:
        html, _ = await page(stand)
        await answered(stand, said("w1", **FINAL))
        async with hanging(stand, said("w2", 5)):
            shown = await data(stand)
    script = html[html.index("<script>") :]
    for letter, one in (
        ("d", shown),
        ("c", shown["calls"]),
        ("w", {**shown["workflows"], **shown["workflows"]["shown"][0]}),
        ("e", shown["engines"][0]),
        ("t", shown["ended"]["types"][0]),
        ("o", shown["tenants"][0]),
        ("d", {**shown, **shown["decisions"][0]}),
    ):
        named = set(re.findall(rf"\b{letter}\.([a-z_]+)", script))
        known = {**shown["decisions"][0], **one} if letter == "d" else one
        allowed = {"parts", "title", "label"} if letter == "c" else set()
        assert named - allowed <= set(known) | {"map", "length"}, letter


async def test_the_data_say_how_things_are() -> None:
    async with open_stand(FakeSettings(stats=STATS), FakeSettings()) as stand:
        for name, deadline_ms in (("good", 60_000.0), ("late", 0.001)):
            await answered(stand, said(name, deadline_ms, **FINAL))
        async with hanging(stand, said("fine", 60_000), said(HOSTILE, 1)):
            shown = await data(stand)
    assert shown["state"] == "ready"
    assert shown["calls"] | {"held_tokens": 0} == {
        "open": 2, "held": 0, "held_tokens": 0, "oldest_held_s": 0.0,
        "received": 4, "answered": 2, "failed": {}, "retries": 0,
    }  # fmt: skip
    workflows = shown["workflows"]
    assert (workflows["open"], workflows["at_risk"], workflows["late"]) == (2, 1, 1)
    (risky,) = workflows["shown"]
    assert (risky["id"], risky["type"], risky["stage"]) == (HOSTILE, "sql", "draft")
    assert risky["slack_s"] < 0
    assert sum(shown["slack"]["calls"]) == 2
    assert len(shown["slack"]["calls"]) == len(shown["slack"]["bounds_s"]) + 1
    assert len(shown["ended"]["periods"]) == PERIODS
    assert sum(p["on-time"] for p in shown["ended"]["periods"]) == 1
    (kind,) = shown["ended"]["types"]
    assert [kind[k] for k in ("type", "on-time", "late", "failed")] == ["sql", 1, 1, 0]
    assert 0 < kind["took_median_s"] <= kind["took_tail_s"]
    assert [(one["id"], one["outcome"]) for one in shown["recent"]] == [
        ("late", "late"), ("good", "on-time"),
    ]  # fmt: skip
    ours, stock = shown["engines"]
    assert (ours["kind"], ours["slots"], ours["kv_usage"]) == ("hexgen", 2, 0.5)
    assert ours["prefill_tokens_per_s"] == pytest.approx(10_000)
    assert (stock["kind"], stock["step_s"]) == ("fcfs", None)
    assert len(shown["decisions"]) == 4


async def test_the_data_say_who_asks_for_what() -> None:
    async with open_stand(FakeSettings(stats=STATS)) as stand:
        for tenant, calls in (("acme", 2), ("other", 1)):
            for _ in range(calls):
                await answered(stand, said("w", **FINAL, **{"x-hexgen-tenant": tenant}))
        async with hanging(stand, said("late", 1, **{"x-hexgen-tenant": "third"})):
            shown = await data(stand)
    rows = {one["tenant"]: one for one in shown["tenants"]}
    assert list(rows) == ["third", "acme", "other"], "who has calls open, then who had most"
    assert [one["answered"] for one in rows.values()] == [0, 2, 1]
    assert [one["running"] + one["held"] for one in rows.values()] == [1, 0, 0]
    assert [one["at_risk"] for one in rows.values()] == [1, 0, 0]
    assert rows["acme"]["output"] == 2 * rows["other"]["output"] > 0
    assert shown["engines"][0]["fit_age_s"] >= 0.0
    twice = overview.total([shown, shown])["tenants"]
    assert [(one["tenant"], one["answered"]) for one in twice] == [
        ("third", 0), ("acme", 4), ("other", 2),
    ]  # fmt: skip


async def test_engines_that_were_never_up_are_shown() -> None:
    async with open_stand(worker_urls=("http://127.0.0.1:9",), wait=False) as stand:
        shown = await data(stand)
    assert shown["state"] == "not ready"
    assert [(e["state"], e["kind"], e["calls"]) for e in shown["engines"]] == [("down", None, 0)]


async def test_the_page_needs_no_key_but_its_data_do() -> None:
    async with open_stand(api_key=("k1",)) as stand:
        await page(stand)
        async with stand.get("/ui/data") as answer:
            assert answer.status == 401


@needs_browser
@pytest.mark.slow
async def test_a_browser_shows_live_traffic() -> None:
    async with (
        open_stand(FakeSettings(stats=STATS), FakeSettings()) as stand,
        open_browser() as tab,
    ):
        await tab.open(stand.router.url + "/ui")
        await tab.until("!document.getElementById('content').hidden")
        assert await tab.js("document.getElementById('no-decisions').hidden") is False
        assert await rows(tab, "engines") == 2
        assert "engine-0" in await text(tab, "engines")

        await answered(stand, said("one", **FINAL))
        await tab.until("document.querySelectorAll('#tenants tr').length === 1")
        assert "default" in await text(tab, "tenants")
        await tab.until("document.getElementById('ended-on-time').textContent === '1'")
        assert await text(tab, "on-time") == "100.0 %"
        assert await rows(tab, "decisions") == 1
        drawn = "[...document.querySelectorAll('#history u.on')].filter(u => u.offsetHeight).length"
        assert await tab.js(drawn) == 1

        async with hanging(stand, said(HOSTILE, 1), said("fine")):
            await tab.until("document.querySelectorAll('#risks tr').length === 1")
            assert await tab.js("document.querySelector('#risks td').textContent") == HOSTILE
            assert await tab.js("document.images.length") == 0
            drawn = "[...document.querySelectorAll('#slack > div')].map(d => d.textContent).join()"
            assert (await tab.js(drawn)).replace(",", "") == "11"
            assert await text(tab, "open-calls") == "2"
        await tab.until("document.querySelectorAll('#risks tr').length === 0")
        assert tab.problems == []
        assert {url.split("?")[0] for url in tab.requested if not url.startswith("data:")} == {
            stand.router.url + "/ui",
            stand.router.url + "/ui/data",
        }

        await tab.js("document.querySelector('#recent tr').click()")
        await tab.until("document.querySelectorAll('#account-calls > div').length === 1")
        assert await tab.js("[0, 0.042, -0.004, 0.5, 60].map(seconds).join()") == (
            "0 s,42 ms,−4 ms,0.5 s,60 s"
        )
        bars = "[...document.querySelectorAll('#account-calls u:not(.gap)')]"
        drawn = f"{bars}.reduce((sum, u) => sum + u.offsetWidth, 0)"
        axis = "document.querySelector('#account-calls > div > div').offsetWidth"
        assert await tab.js(f"{drawn} > {axis} / 2"), "of a deadline a thousand times as long"
        for width in (320, 400, 768, 1400):
            await tab.do(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=800, deviceScaleFactor=1, mobile=True,
            )  # fmt: skip
            assert await tab.js("document.documentElement.scrollWidth") == width
            cut = (
                "[...document.querySelectorAll('td.id')].filter(d => d.scrollWidth > d.clientWidth)"
            )
            assert await tab.js(f"{cut}.length") == 0, "the end of a name is what tells it apart"
            box = "document.getElementById('account-calls').parentElement"
            assert await tab.js(f"{box}.scrollWidth === {box}.clientWidth")
        assert tab.problems == []


@needs_browser
@pytest.mark.slow
async def test_a_browser_asks_for_the_key_and_says_when_the_router_is_gone() -> None:
    async with open_stand(api_key=("k1",)) as stand, open_browser() as tab:
        await tab.open(stand.router.url + "/ui")
        await tab.until("!document.getElementById('key-form').hidden")
        for key, taken in (("wrong", False), ("k1", True)):
            await tab.js(f"document.getElementById('key').value = '{key}'")
            await tab.js("document.querySelector('#key-form button').click()")
            if taken:
                await tab.until("!document.getElementById('content').hidden")
            else:
                await tab.until("document.getElementById('key-note').className === 'bad'")
        assert await tab.js("sessionStorage.length + localStorage.length") == 1
        assert await rows(tab, "engines") == 1
        await stand.router.stop()
        await tab.until("document.getElementById('status').className === 'bad'")
        assert "no answer" in await text(tab, "status-text")
        assert await tab.js("document.body.className") == "stale"


async def rows(tab: Tab, table: str) -> int:
    return int(await tab.js(f"document.querySelectorAll('#{table} tr').length"))


async def text(tab: Tab, name: str) -> str:
    return str(await tab.js(f"document.getElementById('{name}').textContent"))
