"""Alert rules fire when they should, also where nothing good has ever happened, and else do not.

They are asked of what the router and engines really show, scrape by scrape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.engine.server.middleware import exposition
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.engines.attempt import Guard
from hexgen_vllm.router.engines.discovery.discovery import DiscoveryMetrics
from hexgen_vllm.router.engines.discovery.members import EMPTY, SourceBook
from hexgen_vllm.router.engines.fleet import Fleet
from hexgen_vllm.router.engines.probe import Found
from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.metrics import Connections, Metrics
from hexgen_vllm.router.observe.ledger import Ledger
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.replicas import ReplicaMetrics
from hexgen_vllm.router.service import Service
from hexgen_vllm.testing.manual_clock import ManualClock
from hexgen_vllm.types import Call, EngineReport, EngineSpec, StepCost
from tests.engine.server.test_exposition import SNAPSHOT
from tests.router.promql import Store, fires

ROOT = Path(__file__).resolve().parents[2]
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((ROOT / "examples" / "grafana" / "alerts.yml").read_text())[
        "groups"
    ]
    for rule in group["rules"]
}
NAMES = frozenset(re.findall(r"hexgen_\w+", " ".join(rule["expr"] for rule in RULES.values())))
COST = StepCost(c0=0.1, c1=0.0, c2=0.0, p0=0.0, p1=0.01, p2=0.0)
EVERY_S = 60.0
SCRAPES = 50


class Scene:
    """A router's metrics without the router, scraped by a Prometheus of our own."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.book = Ledger()
        coordinator = Coordinator(DispatchOptions(policy="slack", hold_depth=0))
        self.service = Service(coordinator, self.clock, self.book)
        options = RouterOptions(worker_urls=("http://a:1", "http://b:1"))
        self.fleet = Fleet(options, self.service, Guard(1.0, 1.0))
        self.metrics = Metrics(self.book, self.service, self.fleet)
        self.server: Any = SimpleNamespace(open=(), max_connections=64, refused=0)
        self.metrics.add(Connections(self.server))
        self.replicas: Any = SimpleNamespace(others=1, age_s=0.1, sent=1, received=1, unreadable=0)
        self.metrics.add(ReplicaMetrics(self.replicas))
        self.source = SourceBook("dns", "engines.example", 0.0)
        self.age_s = 0.0
        self.engine: dict[str, Any] = dict(SNAPSHOT) | {"recomputed_tokens": 0}
        self.answers = True
        self.learns = True

    def ages_s(self) -> Iterator[tuple[SourceBook, float]]:
        yield self.source, self.age_s

    def up(self, *names: str) -> None:
        """Let engines join."""
        for name in names or tuple(self.fleet.engines):
            spec = EngineSpec(name, max_num_seqs=1)
            self.fleet.joined(name, Found((spec,), ({"id": "tiny"},), True))

    def ended(self, outcome: Outcome, n: int = 1) -> None:
        """Count calls."""
        self.book.arrived["chat"] += n
        self.book.ended["chat", outcome] += n

    def workflow(self, *, on_time: bool, kind: str = "sql") -> None:
        """Count a workflow."""
        self.metrics.outcomes.begun(kind)
        self.metrics.outcomes.add(
            WorkflowRun("w", kind, 0.0, 10.0, last_seen_s=5.0 if on_time else 50.0)
        )

    def watch(self, happens: Callable[[Scene, int], None]) -> dict[str, bool]:
        """Scrape it while things happen; return which alerts are firing at the end."""
        store, times = Store(NAMES), [EVERY_S * i for i in range(SCRAPES)]
        registry = CollectorRegistry()
        registry.register(DiscoveryMetrics(self))  # type: ignore[arg-type]
        for i, at_s in enumerate(times):
            happens(self, i)
            self.clock.advance(EVERY_S)
            store.up(at_s, float(self.answers), instance="r", job="hexgen-router")
            if self.answers:
                text = self.metrics.exposition() + generate_latest(registry)
                store.scrape(text.decode(), at_s, instance="r", job="hexgen-router")
            store.scrape(exposition(self.engine), at_s, instance="e", job="hexgen-engines")
        return {name: fires(store, rule, times) for name, rule in RULES.items()}


def well(scene: Scene, i: int) -> None:
    """All is well, from the first second on."""
    if i == 0:
        scene.up()
        scene.source.wanted = 2
    scene.ended(Outcome.ANSWERED, 5)
    scene.workflow(on_time=True)
    for name in scene.fleet.engines:
        # What is learned goes up and down a little.
        cost = COST.scaled(1.0 + i % 2 / 100) if scene.learns else COST
        report = EngineReport(cost=cost, fit_error=0.1, kv_usage=0.5)
        scene.service.engine_reported(name, report)
    scene.engine["recomputed_tokens"] += 100


def but(what: Callable[[Scene, int], None]) -> Callable[[Scene, int], None]:
    """All is well but for one thing."""

    def happens(scene: Scene, i: int) -> None:
        well(scene, i)
        if i >= SCRAPES // 2:
            what(scene, i)

    return happens


def gone(scene: Scene, i: int) -> None:
    scene.answers = False


def crowded(scene: Scene, i: int) -> None:
    scene.server.refused += 3


def none_ready(scene: Scene, i: int) -> None:
    scene.source.wanted = 2
    for name in scene.fleet.engines:
        scene.fleet.lost(name, "gone")


def no_engines_at_all(scene: Scene, i: int) -> None:
    scene.source.wanted = 2
    for name in list(scene.fleet.engines):
        scene.fleet.remove(name)


def none_named(scene: Scene, i: int) -> None:
    scene.source.wanted = 0
    scene.source.asked(EMPTY, scene.clock.now())


def silent(scene: Scene, i: int) -> None:
    scene.age_s += EVERY_S


def one_down(scene: Scene, i: int) -> None:
    if i == 0:
        scene.up("engine-0")
    scene.source.wanted = 2
    scene.fleet.lost("engine-1", "gone")


def late(scene: Scene, i: int) -> None:
    for kind in ("sql", "chat"):
        scene.workflow(on_time=False, kind=kind)


def waits(scene: Scene, i: int) -> None:
    if not scene.service.coordinator.held:
        scene.up("engine-0")
        for n in range(5):
            call = Call(f"c{n}", f"w{n}", scene.clock.now(), 100, final=True)
            scene.service.coordinator.call_arrived(call, scene.clock.now())


def ends(outcome: Outcome) -> Callable[[Scene, int], None]:
    def happens(scene: Scene, i: int) -> None:
        scene.ended(outcome, 3)

    return happens


def once(scene: Scene, i: int) -> None:
    if i == SCRAPES - 10:
        scene.ended(Outcome.INTERNAL)


def reports(**said: Any) -> Callable[[Scene, int], None]:
    def happens(scene: Scene, i: int) -> None:
        if i == 0:
            scene.up()
        for name in scene.fleet.engines:
            scene.service.engine_reported(name, EngineReport(cost=COST, **said))

    return happens


def unlearned(scene: Scene, i: int) -> None:
    """Engines have calls, and what they tell of their rates has not changed, or never came."""
    scene.learns = False
    if i == 0:
        scene.up()
    for name, load in scene.service.coordinator.engines.items():
        if not load.in_flight:
            call = Call(name, f"w {name}", scene.clock.now(), 100, final=True)
            scene.service.coordinator.call_arrived(call, scene.clock.now())


def recomputes(scene: Scene, i: int) -> None:
    scene.engine["recomputed_tokens"] += 240_000


# Alert, what makes it fire. Each is tried from the start, so that nothing good ever happened,
# and after a while in which all was well.
def alone(scene: Scene, i: int) -> None:
    """Nothing passes the store of the routers any more."""
    well(scene, i)
    scene.replicas.age_s = EVERY_S * i


CASES: tuple[tuple[str, Callable[[Scene, int], None]], ...] = (
    ("RouterGone", gone),
    ("ClientsTurnedAway", crowded),
    ("NoEngineReady", none_ready),
    ("NoEngineReady", no_engines_at_all),
    ("NoEngineFound", none_named),
    ("DiscoverySilent", silent),
    ("RouterAlone", alone),
    ("EngineDown", one_down),
    ("WorkflowsLate", late),
    ("CallsWaitLong", waits),
    ("CallsRefused", ends(Outcome.SATURATED)),
    ("EnginesFail", ends(Outcome.LOST)),
    ("EnginesFail", ends(Outcome.BUSY)),
    ("RouterDefect", once),
    ("RatesUncertain", reports(fit_error=0.9)),
    ("RatesStale", unlearned),
    ("KvFull", reports(kv_usage=0.99)),
    ("WorkThrownAway", recomputes),
)
IDS = [f"{name}-{getattr(what, '__name__', '')}-{i}" for i, (name, what) in enumerate(CASES)]


def test_every_alert_has_a_case() -> None:
    assert {name for name, _ in CASES} == RULES.keys()


def test_nothing_fires_while_all_is_well() -> None:
    assert not [name for name, firing in Scene().watch(well).items() if firing]


@pytest.mark.parametrize(("name", "what"), CASES, ids=IDS)
def test_it_fires_where_nothing_good_ever_happened(
    name: str, what: Callable[[Scene, int], None]
) -> None:
    assert Scene().watch(what)[name]


@pytest.mark.parametrize(("name", "what"), CASES, ids=IDS)
def test_it_fires_when_what_was_well_goes_wrong(
    name: str, what: Callable[[Scene, int], None]
) -> None:
    firing = Scene().watch(but(what))
    assert firing[name]


def test_a_router_of_two_that_is_gone_is_noticed() -> None:
    store = Store(NAMES)
    text = Scene().metrics.exposition().decode()
    times = [EVERY_S * i for i in range(20)]
    for at_s in times:
        store.scrape(text, at_s, instance="a", job="hexgen-router")
        store.up(at_s, 1.0, instance="a", job="hexgen-router")
        store.up(at_s, 0.0, instance="b", job="hexgen-router")
    assert fires(store, RULES["RouterGone"], times)


BOARD = json.loads((ROOT / "examples" / "grafana" / "hexgen-vllm.json").read_text())
PANELS = [
    (panel["title"], target["expr"])
    for panel in BOARD["panels"]
    for target in panel.get("targets", ())
    if "hexgen_router_" in target["expr"]
]


def asked(expr: str) -> str:
    """Return a query of the dashboard as Grafana would ask it."""
    return expr.replace("$router", ".*").replace("$__rate_interval", "5m")


@pytest.mark.parametrize("happens", [late, ends(Outcome.LOST), well], ids=["late", "lost", "well"])
def test_no_panel_of_calls_and_workflows_is_empty(happens: Callable[[Scene, int], None]) -> None:
    """Whatever happened, also when nothing good ever did."""
    names = frozenset(re.findall(r"hexgen_router_\w+", " ".join(expr for _, expr in PANELS)))
    scene, store = Scene(), Store(names)
    times = [EVERY_S * i for i in range(20)]
    for i, at_s in enumerate(times):
        if i == 0:
            scene.up()
        happens(scene, i)
        scene.clock.advance(EVERY_S)
        store.scrape(scene.metrics.exposition().decode(), at_s, instance="r")
    told = re.compile(r"_(?:calls|workflows|retries|at_risk|up|slack_calls|held_\w+)(?:_total)?\{")
    looked_at = [(title, expr) for title, expr in PANELS if told.search(expr)]
    assert len(looked_at) > 10
    for title, expr in looked_at:
        if "engine_" in expr and "engine_up" not in expr:
            continue  # what an engine has not said is left out
        assert store.ask(asked(expr), times[-1]), (title, expr)
