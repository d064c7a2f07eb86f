"""What is written about metrics is true: the tables of docs/metrics.md and the examples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from hexgen_vllm.engine.server import middleware
from hexgen_vllm.router.observe.ledger import OUTCOMES
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import open_stand
from tests.engine.server.test_exposition import SNAPSHOT

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "examples" / "grafana"
FULL = {
    **SNAPSHOT,
    "prefill_share": 0.5,
    "batch_tokens_given_up": 1,
    "let_go_blocks": 1,
    "length_error": 0.1,
    "host_kv": dict.fromkeys(middleware._HOST_KV, 1)
    | {key: {"a": 1} for key in middleware._HOST_KV_BY_REASON},
}
# Prometheus' own labels of a scraped sample.
SCRAPED = {"instance", "job"}

Row = tuple[str, str, str]  # name, type, labels


def row(family: Metric, labels: set[str]) -> Row:
    name = family.name + ("_total" if family.type == "counter" else "")
    return name, family.type, ", ".join(sorted(labels - {"le"} if is_histogram(family) else labels))


def is_histogram(family: Metric) -> bool:
    return bool(family.type == "histogram")


def seen_labels(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels}


async def router_rows() -> set[Row]:
    async with open_stand(FakeSettings(), tune="suggest") as stand:
        for stream in (False, True):
            async with stand.post(stream=stream) as answer:
                await answer.read()
        families = list(stand.context.metrics.families())
    # A metric without a sample yet knows its labels all the same.
    return {row(f, seen_labels(f) | set(getattr(f, "_labelnames", ()))) for f in families}


def engine_rows() -> set[Row]:
    families = text_string_to_metric_families(middleware.exposition(FULL))
    return {row(f, seen_labels(f)) for f in families}


def written_rows(section: str) -> set[Row]:
    text = (ROOT / "docs" / "metrics.md").read_text()
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*) \| (\S.*) \|$", part, re.M)
    return {(n, t, ", ".join(sorted(filter(None, ls.split(", "))))) for n, t, ls, _ in found}


async def test_the_tables_list_every_metric() -> None:
    assert written_rows("Router") == await router_rows()
    assert written_rows("Engine") == engine_rows()


def samples() -> dict[str, set[str]]:
    """Return the labels of every sample name that the tables promise."""
    found: dict[str, set[str]] = {}
    for name, kind, labels in written_rows("Router") | written_rows("Engine"):
        own = set(filter(None, labels.split(", "))) | SCRAPED
        if kind == "histogram":
            found |= {f"{name}_{part}": own for part in ("count", "sum")}
            found[f"{name}_bucket"] = own | {"le"}
        else:
            found[name] = own
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GRAFANA / "hexgen-vllm.json").read_text())
    return found


def queries() -> Iterator[str]:
    board = dashboard()
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
    for group in yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_examples_ask_only_for_what_there_is() -> None:
    known, asked = samples(), 0
    for query in queries():
        for name, _, inside in re.findall(r"\b(hexgen_(router|vllm)_\w+)(?:\{([^}]*)\})?", query):
            asked += 1
            assert name in known, query
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
            by = re.findall(r"by \(([^)]*)\)", query)
            grouped = {label.strip() for labels in by for label in labels.split(",")}
            assert used | grouped <= known[name], query
    assert asked > 50


def test_examples_ask_for_outcomes_that_there_are() -> None:
    found = {
        outcome
        for query in queries()
        for outcome in re.findall(r'workflows_total\{[^}]*outcome="([^"]+)"', query)
    }
    assert found == {"on-time"} <= set(OUTCOMES)


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    panels = [p for p in board["panels"] if p["type"] != "row"]
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    assert all(p["title"] and p["targets"] for p in panels)
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        assert panel["datasource"]["uid"] == "${datasource}"
    boxes = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(boxes)) == len(boxes)


def test_the_scrape_configuration_finds_its_rules() -> None:
    found = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    for name in found["rule_files"]:
        assert (GRAFANA / name).is_file()
    for group in yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning", "info")
            assert rule["annotations"]["summary"]
