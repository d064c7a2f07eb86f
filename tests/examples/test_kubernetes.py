"""The chart and the manifests: rendered by Helm's library, checked against Kubernetes' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python.chart import lint

import hexgen_vllm
from examples.kubernetes.render import (
    CHART,
    EXAMPLE,
    MANIFESTS,
    BadValues,
    main,
    manifests,
    render,
    schema,
)
from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.option import from_mapping
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.main import read_options
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.routes import public
from hexgen_vllm.testing.fake_server import FakeServer
from hexgen_vllm.testing.stand import open_stand
from tests.examples.custom_resources import OTHERS
from tests.router.engines.discovery.dns_server import dns_server

Thing = dict[str, Any]

FULL = {
    "router": {
        "discovery": "labels",
        "replicas": 2,
        "store": {"deploy": True},
        "keysSecret": "keys",
        "options": {"queue-size": 100, "policy": "least_outstanding"},
        "preStopSeconds": 7,
        "shutdownSeconds": 33,
        "service": {"type": "LoadBalancer", "port": 8080},
        "podAnnotations": {"team": "sql"},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "cpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "maxUnavailable": 1,
    },
    "engineDefaults": {
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        "envFrom": [{"secretRef": {"name": "hf"}}],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "engines": {
        "h100": {"gpus": 8, "args": ["--tensor-parallel-size=8", "--hexgen-host-kv-gib=20"]},
        "cpu": {"gpus": 0, "resources": {"requests": {"cpu": "8"}}, "workload": "StatefulSet"},
        "l4": {
            "replicas": 2,
            "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 6},
            "affinity": {"nodeAffinity": {}},
            "podAnnotations": {"a": "b"},
            "maxUnavailable": 0,
        },
        "amd": {"gpuResource": "amd.com/gpu", "modelCacheClaim": "models", "startupSeconds": 5},
        "stock": {"command": ["vllm", "serve"], "image": "vllm/vllm-openai:v0.32.0"},
    },
    "enginePort": 9000,
    "imagePullSecrets": [{"name": "registry"}],
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"team": "sql"}}}],
    },
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.test"]},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}
NUMBERS = {  # names that YAML would take for something else than text
    "router": {"keysSecret": "007"},
    "engineDefaults": {"modelCacheClaim": "1e3"},
    "engines": {"4090": {}, "on": {}},
}
EXAMPLE_VALUES = yaml.safe_load(EXAMPLE.read_text())
VALUES = {
    "least": {"engines": {"gpu": {}}},
    "example": EXAMPLE_VALUES,
    "by-label": EXAMPLE_VALUES | {"router": {"discovery": "labels"}},
    "full": FULL,
    "numbers": NUMBERS,
}
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VERSIONS = ("1.27", "1.32", "1.37")
each_values = pytest.mark.parametrize("which", VALUES)


@cache
def things(which: str) -> tuple[Thing, ...]:
    """Return all objects that some values give."""
    texts = render(VALUES[which]).values()
    return tuple(thing for text in texts for thing in yaml.safe_load_all(text))


def of(which: str, kind: str) -> Iterator[Thing]:
    return (thing for thing in things(which) if thing["kind"] == kind)


def workloads(which: str, component: str) -> list[Thing]:
    every = [*of(which, "Deployment"), *of(which, "StatefulSet")]
    found = [w for w in every if labels(w)["app.kubernetes.io/component"] == component]
    assert found
    return found


def every_workload() -> dict[str, Thing]:
    found = (*of("full", "Deployment"), *of("full", "StatefulSet"))
    return {workload["metadata"]["name"]: workload for workload in found}


def labels(workload: Thing) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def container(workload: Thing) -> Thing:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


def options(which: str, tmp_path: Path) -> tuple[RouterOptions, DispatchOptions]:
    """Return what the router reads from the file that the chart gives it."""
    (config,) = of(which, "ConfigMap")
    path = tmp_path / "router.yaml"
    path.write_text(config["data"]["router.yaml"])
    router, dispatch = read_options(path)
    return from_mapping(RouterOptions, router), from_mapping(DispatchOptions, dispatch)


def test_the_manifests_are_what_the_chart_gives() -> None:
    found = {str(p.relative_to(MANIFESTS)): p.read_text() for p in MANIFESTS.rglob("*.yaml")}
    assert found == manifests(), "write them anew: python -m examples.kubernetes.render"


@each_values
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_has_the_form_that_kubernetes_asks_for(which: str, version: str) -> None:
    assert len(things(which)) >= 5
    for thing in things(which):
        if thing["kind"] in OTHERS:
            jsonschema.validate(thing, OTHERS[thing["kind"]])
        else:
            kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_check_of_the_form_can_fail(version: str) -> None:
    checked = [thing for thing in things("full") if thing["kind"] not in OTHERS]
    assert {thing["kind"] for thing in checked} == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy",
        "PodDisruptionBudget", "Role", "RoleBinding", "Service", "ServiceAccount", "StatefulSet",
    }  # fmt: skip
    for thing in checked:
        with pytest.raises(kubernetes_validate.ValidationError, match="spek"):
            kubernetes_validate.validate(thing | {"spek": {}}, version, strict=True)
    for kind, form in OTHERS.items():
        (thing,) = of("full", kind)
        with pytest.raises(jsonschema.ValidationError, match="spek"):
            jsonschema.validate(thing | {"spek": {}}, form)


@pytest.mark.parametrize("release", ["r", "123", "a-name-of-fifty-three-characters-" + "x" * 20])
def test_no_two_objects_have_one_name_however_long_that_of_the_release(release: str) -> None:
    values = {"engines": {"a100": {}, "a10g": {}, "x" * 32: {"workload": "StatefulSet"}}}
    texts = render(values, release).values()
    named = [(t["kind"], t["metadata"]["name"]) for text in texts for t in yaml.safe_load_all(text)]
    assert len(set(named)) == len(named) == 10
    assert all(isinstance(name, str) and len(name) <= 63 for _, name in named)
    sets = [name for kind, name in named if kind in ("Deployment", "StatefulSet")]
    assert all(len(name) <= 52 for name in sets if not name.endswith("-router"))  # pods add to it


def test_helm_finds_nothing_to_complain_of() -> None:
    report = lint(CHART, EXAMPLE_VALUES, strict=True)
    assert not report["errors"]
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = hexgen_vllm.__version__
    assert (chart["version"], chart["appVersion"]) == (version, version)
    images = re.findall(r"registry\.example/\S+:(\S+)", (CHART / "values.yaml").read_text())
    assert images == [version, version]


@each_values
def test_the_router_takes_its_file(which: str, tmp_path: Path) -> None:
    router, dispatch = options(which, tmp_path)
    (workload,) = workloads(which, "router")
    own = container(workload)
    assert own["command"][:4] == [
        "hexgen-vllm",
        "router",
        "--config",
        "/etc/hexgen-vllm/router.yaml",
    ]
    assert (router.host, router.port) == ("0.0.0.0", own["ports"][0]["containerPort"])
    assert dispatch.policy == ("least_outstanding" if which == "full" else "slack")
    assert router.discovers


@each_values
def test_discovery_finds_the_engines_and_nothing_else(which: str, tmp_path: Path) -> None:
    router, _ = options(which, tmp_path)
    engines = workloads(which, "engine")
    ports = {container(w)["ports"][0]["containerPort"] for w in engines}
    if router.worker_dns:
        (service,) = (s for s in of(which, "Service") if s["spec"].get("clusterIP") == "None")
        (port,) = ports
        assert router.worker_dns == (f"{service['metadata']['name']}:{port}",)
        chosen = service["spec"]["selector"]
    else:
        chosen = dict(label.split("=") for label in router.selector)
        assert ports == {router.service_discovery_port}
        assert router.service_discovery_namespace == "llm"
    for workload in (*engines, *workloads(which, "router")):
        assert (chosen.items() <= labels(workload).items()) is (workload in engines)


@each_values
def test_services_and_selectors_fit(which: str) -> None:
    for workload in (*workloads(which, "engine"), *workloads(which, "router")):
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels(workload).items()
    selectors = [str(w["spec"]["selector"]) for w in workloads(which, "engine")]
    assert len(set(selectors)) == len(selectors)
    for service in of(which, "Service"):
        component = service["spec"]["selector"]["app.kubernetes.io/component"]
        for workload in workloads(which, component):
            assert service["spec"]["selector"].items() <= labels(workload).items()
            names = {port["name"] for port in container(workload)["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for monitor in of(which, "PodMonitor"):
        chosen = monitor["spec"]["selector"]["matchLabels"].items()
        for component in ("router", "engine"):
            assert all(chosen <= labels(w).items() for w in workloads(which, component))


@each_values
def test_probes_ask_for_pages_that_there_are(which: str) -> None:
    pages = {route.path for route in public()}
    (router,) = workloads(which, "router")
    probes = {name: container(router)[f"{name}Probe"] for name in ("liveness", "readiness")}
    assert {n: p["httpGet"]["path"] for n, p in probes.items()} == {
        "liveness": "/liveness", "readiness": "/readiness",
    }  # fmt: skip
    assert {p["httpGet"]["path"] for p in probes.values()} <= pages
    for monitor in of(which, "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["path"] in pages
        for workload in (router, *workloads(which, "engine")):
            assert endpoint["port"] in {port["name"] for port in container(workload)["ports"]}
    for workload in workloads(which, "engine"):
        own = container(workload)
        for name in ("startup", "liveness", "readiness"):
            assert own[f"{name}Probe"]["httpGet"] == {"path": "/health", "port": "http"}


@each_values
def test_there_is_time_to_drain(which: str, tmp_path: Path) -> None:
    router, _ = options(which, tmp_path)
    for workload in (*workloads(which, "engine"), *workloads(which, "router")):
        own = container(workload)
        wait, seconds = own["lifecycle"]["preStop"]["exec"]["command"]
        said = [a.partition("=")[2] for a in own.get("args", ()) if "--shutdown-timeout" in a]
        ends = float(said[0]) if said else router.shutdown_timeout
        grace = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert wait == "sleep"
        assert grace > float(seconds) + ends
        if said:  # by then the router knows that the engine leaves
            assert float(seconds) >= router.worker_dns_refresh_secs + 2.0
    (one,) = workloads("full", "router")
    assert one["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 7 + 33 + 10


def test_engines_get_what_their_type_needs() -> None:
    found = {labels(w)["hexgen-vllm/type"]: w for w in workloads("full", "engine")}
    limits = {name: container(w)["resources"].get("limits") for name, w in found.items()}
    assert limits == {
        "h100": {"nvidia.com/gpu": "8"}, "cpu": {}, "amd": {"amd.com/gpu": "1"},
        "stock": {"nvidia.com/gpu": "1"}, "l4": {"nvidia.com/gpu": "1"},
    }  # fmt: skip
    assert found["cpu"]["kind"] == "StatefulSet"
    assert container(found["stock"])["command"] == ["vllm", "serve"]
    assert container(found["amd"])["startupProbe"]["failureThreshold"] == 1
    ours = {f"--hexgen-{name.replace('_', '-')}" for name in EngineOptions.__dataclass_fields__}
    args = container(found["h100"])["args"]
    assert {a.partition("=")[0] for a in args if a.startswith("--hexgen-")} <= ours
    assert args[-2:] == ["--tensor-parallel-size=8", "--hexgen-host-kv-gib=20"]


def test_pods_are_pulled_annotated_and_placed_as_asked() -> None:
    every = {
        w["metadata"]["name"]: w for w in (*of("full", "Deployment"), *of("full", "StatefulSet"))
    }
    pods = {name: w["spec"]["template"] for name, w in every.items()}
    assert all(p["spec"]["imagePullSecrets"] == [{"name": "registry"}] for p in pods.values())
    assert pods["hexgen-router"]["metadata"]["annotations"]["team"] == "sql"
    assert "checksum/config" in pods["hexgen-router"]["metadata"]["annotations"]
    assert pods["hexgen-l4"]["metadata"]["annotations"] == {"a": "b"}
    assert pods["hexgen-router"]["spec"]["affinity"] == {"podAntiAffinity": {}}
    assert pods["hexgen-l4"]["spec"]["affinity"] == {"nodeAffinity": {}}
    assert all("affinity" not in pods[f"hexgen-{n}"]["spec"] for n in ("cpu", "amd", "stock"))


def test_budgets_and_autoscaling_are_of_the_workload_they_name() -> None:
    by_name = {
        w["metadata"]["name"]: w for w in (*of("full", "Deployment"), *of("full", "StatefulSet"))
    }
    budgets = {b["metadata"]["name"]: b for b in of("full", "PodDisruptionBudget")}
    assert budgets.keys() == {f"hexgen-{n}" for n in ("router", "h100", "cpu", "amd", "stock")}
    for name, budget in budgets.items():
        wanted = budget["spec"]["selector"]["matchLabels"]
        fitting = [n for n, w in by_name.items() if wanted.items() <= labels(w).items()]
        assert fitting == [name]
    (scaler,) = of("full", "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "hexgen-l4")
    assert by_name[target["name"]]["kind"] == target["kind"]
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 6)
    (metric,) = scaler["spec"]["metrics"]
    name = metric["external"]["metric"]["name"]
    assert f"`{name}`" in (Path(hexgen_vllm.__file__).parents[1] / "docs/metrics.md").read_text()


def test_only_the_router_reaches_engines_and_only_clients_the_router() -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in of("full", "NetworkPolicy")}
    engines, router = policies["hexgen-engines"], policies["hexgen-router"]
    allowed = engines["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    (routers,) = workloads("full", "router")
    assert allowed.items() <= labels(routers).items()
    for workload in workloads("full", "engine"):
        assert engines["podSelector"]["matchLabels"].items() <= labels(workload).items()
        assert not router["podSelector"]["matchLabels"].items() <= labels(workload).items()
    assert router["podSelector"]["matchLabels"].items() <= labels(routers).items()
    assert router["ingress"][0]["from"] == FULL["networkPolicy"]["from"]
    ports = [*engines["ingress"][0]["ports"], *router["ingress"][0]["ports"]]
    assert ports == [{"port": "http"}, {"port": "http"}]
    assert not list(of("least", "NetworkPolicy"))


def test_the_route_leads_to_the_routers_service() -> None:
    (route,) = of("full", "HTTPRoute")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    (service,) = (s for s in of("full", "Service") if s["metadata"]["name"] == backend["name"])
    assert backend["port"] == service["spec"]["ports"][0]["port"] == 8080
    assert not list(of("least", "HTTPRoute"))


def test_only_discovery_by_label_may_read_pods() -> None:
    assert not list(of("example", "Role"))
    (role,), (binding,) = of("by-label", "Role"), of("by-label", "RoleBinding")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    (account,) = of("by-label", "ServiceAccount")
    (router,) = workloads("by-label", "router")
    name = account["metadata"]["name"]
    assert router["spec"]["template"]["spec"]["serviceAccountName"] == name
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "llm"}]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "engines must have an entry per type of GPU"),
        ({"engins": {}}, "additional properties 'engins' not allowed"),
        ({"engines": {"a": {"replicas": "two"}}}, "at '/engines/a/replicas': got string"),
        ({"engines": {"a": {"replicas": -1}}}, "at '/engines/a/replicas': minimum"),
        ({"engines": {"a": {"workload": "Pod"}}}, "at '/engines/a/workload': value must be one of"),
        ({"engines": {"a": {"gpu": 1}}}, "at '/engines/a': additional properties 'gpu'"),
        ({"engines": {"A100": {}}}, "'A100'"),
        ({"router": {"discovery": "mdns"}}, "at '/router/discovery': value must be one of"),
        ({"router": {"port": 80}}, "at '/router/port': minimum"),
        (
            {"engines": {"a": {}}, "router": {"options": {"port": 1}}},
            "router.options must not have",
        ),
        ({"engines": {"router": {}}}, "engines must not have a type called router"),
        ({"router": {"options": {"polcy": 1}}}, "additional properties 'polcy' not allowed"),
        ({"router": {"options": {"policy": "best"}}}, "at '/router/options/policy': value must be"),
        ({"router": {"options": {"alpha": 2}}}, "at '/router/options/alpha': maximum"),
        ({"router": {"options": {"queue-size": "x"}}}, "at '/router/options/queue-size': got"),
        (
            {"engines": {"a": {}}, "router": {"options": {"ssl-certfile": "/x"}}},
            "router.options must not have ssl-certfile: probes and Service speak HTTP",
        ),
        (["engines"], "values must be a mapping."),
        ({"router": {"image": ""}}, "at '/router/image': minLength"),
        (
            {"engines": {"a": {}}, "httpRoute": {"enabled": True}},
            "httpRoute.parentRefs must name a Gateway",
        ),
        ({"engineDefaults": {"autoscaling": {"max": 3}}}, "additional properties 'max'"),
        ({"router": {"maxUnavailable": -1}}, "at '/router/maxUnavailable': minimum"),
        ({"podMonitor": {"interval": "often"}}, "at '/podMonitor/interval'"),
        ({"engineDefaults": {"sharedMemory": "much"}}, "at '/engineDefaults/sharedMemory'"),
    ],
)
def test_bad_values_are_one_sentence(
    values: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadValues) as raised:
        render(values)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_schema_knows_the_options_of_the_router() -> None:
    written = (CHART / "values.schema.json").read_text()
    assert written == schema(), "write it anew: python -m examples.kubernetes.render"


def test_the_schema_is_one_and_knows_every_value() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for values in (defaults, *VALUES.values()):
        part = {**SCHEMA, "required": []}
        jsonschema.validate(values, part)
    assert defaults.keys() == SCHEMA["properties"].keys() - {"global"}
    assert defaults["router"].keys() == SCHEMA["properties"]["router"]["properties"].keys()
    assert defaults["engineDefaults"].keys() == SCHEMA["$defs"]["engine"]["properties"].keys()


async def test_a_router_with_the_charts_file_finds_engines(tmp_path: Path) -> None:
    async with FakeServer() as engine, dns_server() as dns:
        values = {"engines": {"gpu": {}}, "enginePort": engine.port}
        (text,) = (t for name, t in render(values).items() if name == "router.yaml")
        config = next(iter(yaml.safe_load_all(text)))
        path = tmp_path / "router.yaml"
        path.write_text(config["data"]["router.yaml"])
        dns.set("hexgen-engines", "A", "127.0.0.1")
        given = {**read_options(path)[0], "host": "127.0.0.1", "port": 0}
        given |= {"worker_urls": (), "worker_dns_server": dns.address}
        async with open_stand(wait=False, **given) as stand:
            context: Context = stand.context
            await stand.until(lambda: context.ready)
            async with stand.post() as answer:
                assert answer.status == 200
