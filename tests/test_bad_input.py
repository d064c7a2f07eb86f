"""Bad input of every command gets one sentence and exit code 2."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import NamedTuple

import pytest

from hexgen_vllm import cli, serve

URL = "http://127.0.0.1:9"
FLEET = "fleet: reference-4\n"
PLAYED = f"{FLEET}arrivals: {{loads: [0.5]}}\n"
LIVE = '[{"policy": "slack"}]'
RECENT = {"type": "t", "arrived_s": 0, "calls": [
    {"stage": "s", "at_s": 0, "took_s": 1, "prompt": 5, "output": 5}]}  # fmt: skip


class Mistake(NamedTuple):
    """What is wrong, in words for people, a command line, and what its file says if it has one."""

    what: str
    words: str
    file: str = ""


def router(what: str, words: str = "--config FILE", file: str = "") -> Mistake:
    return Mistake(what, f"router {words}", file)


def cluster(what: str, file: str) -> Mistake:
    return Mistake(what, "SERVE --cluster FILE", file)


def scenario(what: str, file: str, words: str = "") -> Mistake:
    return Mistake(what, f"sim FILE {words}", file)


def tuned(what: str, words: str, file: str = FLEET) -> Mistake:
    return Mistake(what, f"tune --fleet FILE {words}", file)


def recent(what: str, line: str) -> Mistake:
    return Mistake(what, "tune --fleet FLEET --trace FILE.jsonl", line)


def engine(keys: str) -> str:
    return f"engines:\n  - {{{keys}}}\n"


def replicas(keys: str) -> str:
    return engine(f"name: a, model: m, ray: {keys}")


def fleet_of(keys: str) -> str:
    return f"fleet:\n  - {{{keys}}}\narrivals: {{loads: [0.5]}}\n"


def changed(**values: object) -> str:
    return json.dumps({**RECENT, **values})


OPTIONS = (
    router("unknown … …; known are ….", file="nonsense: 1"),
    router(
        "… and … are names of one option; give it once.", file="queue-size: 5\nmax-held-calls: 5"
    ),
    router("… must be one of …, not ….", file="policy: best"),
    router("… must be at least …, not ….", "--alpha -1"),
    router("… must be at most …, not ….", "--alpha 2"),
    router("… must be finite, not ….", "--alpha nan"),
    router("… must be a number, not ….", file="alpha: x"),
    router("… must be a whole number, not ….", file="port: 1.5"),
    router("… must be true or false, not ….", file="disable-retries: 1"),
    router("… must be text, not ….", file="host: 1"),
    router("… must be like NAME=NUMBER, not ….", "--tenant-weights a"),
    router("tenant_weights of … must be a number above 0.", "--tenant-weights a=0"),
)
ROUTER = (
    router("worker_urls must be like http://host:8000 or name=http://host:8000, not ….",
           "--worker-urls gpu-a"),
    router("worker_urls must have different …, not two ….", f"--worker-urls {URL} {URL}"),
    router("worker_allowed_hosts must be hosts or networks without a port, not ….",
           f"--worker-urls {URL} --worker-allowed-hosts a:1"),
    router("… must be text or a list of texts.", file="worker-urls: 1"),
    router("ssl_certfile must be given with ssl_keyfile and ssl_ca_certs.",
           f"--worker-urls {URL} --ssl-keyfile FILE", "x"),
    router("… must be a file, and … is none.", f"--worker-urls {URL} --ssl-certfile /none"),
    router("… cannot be used: ….", f"--worker-urls {URL} --ssl-certfile FILE --port 0", "x"),
    router("allowed_origins must name origins when allow_credentials is set.",
           f"--worker-urls {URL} --allowed-origins * --allow-credentials"),
    router("cannot listen on …: ….", f"--worker-urls {URL} --host 192.0.2.1 --port 0"),
    router("cannot listen on …:…: ….",
           f"--worker-urls {URL} --host 192.0.2.1 --port 0 --router-workers 2"),
    router("cannot listen on … for metrics: ….",
           f"--worker-urls {URL} --port 0 --prometheus-host 192.0.2.1 --prometheus-port 1"),
    router("worker_urls must name at least one engine (--worker-urls URL ...), worker_dns or "
           "service_discovery must find them, or admin_api_key must let them be registered.", ""),
    router("api_key and admin_api_key must not be empty.", file="api-key: ['']"),
)  # fmt: skip
DISCOVERY = (
    router("worker_dns must be like NAME:PORT, or like _http._tcp.NAME for SRV records, not ….",
           "--worker-dns http://a:1"),
    router("worker_dns must have different services, not two ….", "--worker-dns a:1 a:1"),
    router("worker_dns_server must be like 10.0.0.10:53, not ….",
           "--worker-dns a:1 --worker-dns-server name"),
    router("worker_dns_least_refresh_secs must be at most worker_dns_refresh_secs.",
           "--worker-dns-refresh-secs 1 --worker-dns-least-refresh-secs 2"),
    router("service_discovery and selector must be given together.", "--service-discovery"),
    router("selector must be like KEY=VALUE, not ….", "--service-discovery --selector app"),
    router("kubeconfig must be a file, and … is none.",
           "--service-discovery --selector a=b --kubeconfig /none --port 0"),
    router("kubeconfig … cannot be used: ….",
           "--service-discovery --selector a=b --kubeconfig FILE --port 0", "x"),
)  # fmt: skip
CLUSTER = (
    cluster("… line …: not YAML, ….", "a: [\n"),
    cluster("… line …: … is there twice.", "a: 1\na: 2\n"),
    cluster("must be a mapping.", "- a\n"),
    cluster("must be a list of at least one engine.", "engines: []\n"),
    cluster("name must be 1 to 64 letters, digits and _ . -.", engine("name: a b, model: m")),
    cluster("model, url or command is missing.", engine("name: a")),
    cluster("… does not go with ….", engine("name: a, url: 'http://a:1', model: m")),
    cluster("url must be like http://host:port, not ….", engine("name: a, url: a")),
    cluster("args must be a list of words or a mapping.", engine("name: a, model: m, args: 1")),
    cluster("args must not set …; the engine's own key … does.",
            engine("name: a, model: m, args: [--port=1]")),
    cluster("env must be a mapping of names to words or numbers.",
            engine("name: a, model: m, env: 1")),
    cluster("device must be a number or text such as '0,1', not ….",
            engine("name: a, model: m, device: [0]")),
    cluster("command must be a list of words.", engine("name: a, command: run")),
    cluster("hexgen must be a mapping of scheduler options.",
            engine("name: a, model: m, hexgen: 1")),
    cluster("hexgen options do not go with scheduler ….",
            engine("name: a, model: m, scheduler: fcfs, hexgen: {order: edf}")),
    cluster("engines must have different names, but two are ….",
            "engines:\n  - {name: a, model: m}\n  - {name: a, model: m}\n"),
    cluster("unknown … …; known are ….",
            engine("name: a, model: m") + "router: {nonsense: 1}\n"),
    cluster("… does not belong among the router's other options.",
            engine("name: a, model: m") + "router: {worker-urls: [a]}\n"),
    Mistake("… cannot be read: ….", "SERVE --cluster EMPTY"),
)  # fmt: skip
RAY = (
    cluster("ray must be a mapping such as {resources: {fast: 1}}.", replicas("1")),
    cluster("resources must be more than 0, and … is ….", replicas("{resources: {a: 0}}")),
    cluster("… must be a mapping of names to numbers.", replicas("{resources: 1}")),
    cluster("max_replicas must be at least min_replicas, which is …, not ….",
            replicas("{min_replicas: 2, max_replicas: 1}")),
    cluster("max_replicas must be given where min_replicas is 0.", replicas("{min_replicas: 0}")),
    cluster("port does not go with several replicas.", replicas("{max_replicas: 2}, port: 1")),
    cluster("engines must have different names, but … is a replica.",
            replicas("{max_replicas: 2}") + "  - {name: a-0, model: m}\n"),
    cluster("scaling must be a mapping.", engine("name: a, model: m") + "ray: {scaling: 1}\n"),
)  # fmt: skip
SIM = (
    scenario("'fleet' is missing.", "arrivals: {loads: [1]}\n", "--against LIVE"),
    scenario("… is missing.", FLEET),
    scenario("unknown key …; known are ….", f"{PLAYED}nonsense: 1\n"),
    scenario("must be a list of at least one engine, or a fleet's name.",
             "fleet: []\narrivals: {loads: [1]}\n"),
    scenario("must be a list or one of ….", "fleet: none\narrivals: {loads: [1]}\n"),
    scenario("an engine needs a device or a cost.", fleet_of("name: a")),
    scenario("device must be one of … or come with a cost.", fleet_of("device: Z80")),
    scenario("count must be a whole number from 1 to 10000.", fleet_of("device: A100, count: 0")),
    scenario("the name … is there twice.",
             "fleet:\n  - {device: A100, name: a}\n  - {device: A100, name: a}\n"
             "arrivals: {loads: [0.5]}\n"),
    scenario("… must be a number of seconds, 0 or more.",
             fleet_of("name: a, cost: {c0: -1, c1: 0, c2: 0, p0: 0, p1: 0, p2: 0}")),
    scenario("a decode step must take time.",
             fleet_of("name: a, cost: {c0: 0, c1: 0, c2: 0, p0: 0, p1: 0, p2: 0}")),
    scenario("must be a list of at least one policy.", f"{PLAYED}policies: []\n"),
    scenario("a policy and its name must be text.", f"{PLAYED}policies: [{{policy: 1}}]\n"),
    scenario("policy must be one of …, not ….", f"{PLAYED}policies: [best]\n"),
    scenario("must be a list of different whole numbers, 0 or more.", f"{PLAYED}seeds: [1, 1]\n"),
    scenario("… must be a list of ….", f"{FLEET}arrivals: {{loads: 1}}\n"),
    scenario("… must be a mapping of names to ….", f"{PLAYED}deadline: {{tenants: [a]}}\n"),
    scenario("… must be a list of ….", f"{PLAYED}workload: {{tenants: a}}\n"),
    scenario("the scale of tenant … must be more than 0.",
             f"{PLAYED}deadline: {{tenants: {{a: 0}}}}\n"),
    scenario("exactly one of loads, rates and times_s must be given.",
             f"{FLEET}arrivals: {{loads: [1], rates: [1]}}\n"),
    scenario("loads and rates must be more than 0, not ….", f"{FLEET}arrivals: {{loads: [0]}}\n"),
    scenario("times_s has … arrivals, the workload … workflows.",
             f"{FLEET}arrivals: {{times_s: [1, 2]}}\n"),
    scenario("recorded arrival … must not be before the one before it.",
             f"{FLEET}arrivals: {{times_s: [2, 1]}}\n"),
    scenario("--timeline shows one run, not …; choose one --policy, --load and --seed.",
             PLAYED, "--timeline OUT --seed 1 2"),
    scenario("--seed must be 0 or more.", PLAYED, "--seed -1"),
    scenario("--against takes one --policy.", PLAYED, "--against FILE --policy slack paper"),
    Mistake("… cannot be read as JSON: ….", "sim FLEET --against FILE", "no"),
    Mistake("… does not hold a list of results.", "sim FLEET --against FILE", "{}"),
    Mistake("… holds no live run.", "sim FLEET --against FILE", "[]"),
    Mistake("… is not JSON: ….", "sim PLAYED --trace FILE", "no"),
    Mistake("… must hold a JSON list with at least one entry.", "sim PLAYED --trace FILE", "[]"),
    Mistake("… cannot be written: ….", "reference --out EMPTY"),
)  # fmt: skip
TUNE = (
    tuned("grid takes exactly one knob; name it with --knobs.", "--load 0.5 --grid 3"),
    tuned("… is not a knob of …; its knobs are ….", "--load 0.5 --knobs nonsense"),
    tuned("rate and load cannot both be given.", "--load 0.5 --rate 1"),
    tuned("the workload has no times; give --rate or --load.", ""),
    tuned("--seed must be different whole numbers, 0 or more.", "--load 0.5 --seed 1 1"),
    tuned("… must be NAME=NUMBER, not ….", "--load 0.5 --weight a"),
    recent("…: unknown key …; known are ….", changed(nonsense=1)),
    recent('…: "calls" must be a list of 1 to … calls.', changed(calls=[])),
    recent('…: "…" must be a name, not ….', changed(type=1)),
    recent('…: "…" must be a number of seconds, not ….', changed(arrived_s="x")),
    recent('…: "…" is missing.', changed(calls=[{"stage": "s"}])),
    recent('…: "…" must be a whole number from … to …, not ….',
           changed(calls=[{**RECENT["calls"][0], "prompt": 0}])),  # type: ignore[index]
)  # fmt: skip
OTHERS = (
    Mistake("url must start with http:// or https://, not ….", "calibrate --url x"),
    Mistake("… cannot be used: ….", f"calibrate --url {URL}"),
    Mistake("… --url and … --policy-name do not make pairs.",
            f"bench live --url {URL} --url {URL} --policy-name a"),
    Mistake("--plot must end in .png, .svg, .pdf or another format of matplotlib, not ….",
            f"bench live --url {URL} --plot plot.doc"),
    Mistake("repeats must be at least 1.", "bench router --repeats 0"),
    Mistake("scale must be more than 0.", "bench router --scale 0"),
    Mistake("peer must be a program, not ….", "bench router --peer /none"),
    Mistake("--… must be at least 1.", "bench sim --repeats 0"),
    Mistake("--… must be more than 0.", "bench soak --minutes 0"),
    Mistake("device: … is none of cpu, cuda and cuda:N.", "bench kv --device tpu"),
    Mistake("there is no scenario file in ….", "bench report --scenarios EMPTY"),
    Mistake("there is no scenario … in ….", "bench report --only none"),
    Mistake("--workers, --workflows and --seeds must be at least 1.", "bench report --workers 0"),
    Mistake("… is no installed vLLM: its _version.py tells no version.",
            "patch status --vllm EMPTY"),
)  # fmt: skip
DEEP = "[" * 1200
LAUGHS = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
ODD_FILES = (
    *(router(f"{name} in YAML", file=text) for name, text in (
        ("aliases of aliases", LAUGHS),
        ("a circle", "a: &a {b: *a}"),
        ("deep lists", DEEP),
        ("no date", "port: !!timestamp x"),
        ("no truth value", "port: !!bool x"),
        ("no whole number", "port: !!int ''"),
        ("a sign without a number", "port: !!int '-'"),
        ("no number", "alpha: !!float ''"),
        ("NUL", r'host: "a\0b"'),
        ("half a pair", r'host: "\ud800"'),
    )),
    router("NUL in a path", file=r'ssl-certfile: "a\0b"'),
    *(Mistake(f"deep JSON for {words.split()[0]} {words.split()[1]}", words, DEEP) for words in (
        "sim PLAYED --trace FILE",
        "sim PLAYED --trace FILE --trace-format text2sql",
        "sim FLEET --against FILE",
        "trace info FILE",
        "tune --fleet FLEET --trace FILE.jsonl",
        "text2sql --database BASE --questions FILE",
        "text2sql --benchmark BENCHMARK",
    )),
    *(Mistake(f"a name that is too long for {words.split()[0]}", words) for words in (
        "sim PLAYED --trace LONG", "sim FLEET --against LONG", "trace info LONG",
        "text2sql --benchmark LONG", "patch status --vllm LONG", "check-policy LONG:Class",
        "reference --out LONG",
    )),
    Mistake("a list is no cluster", "check --kind cluster FILE", "[1, 2]"),
    Mistake("a list is no scenario", "check --kind scenario FILE", "[1, 2]"),
    Mistake("no fleet to add to, before an engine is measured",
            f"calibrate --url {URL} --fleet FILE", DEEP),
)  # fmt: skip
MISTAKES = (*OPTIONS, *ROUTER, *DISCOVERY, *CLUSTER, *RAY, *SIM, *TUNE, *OTHERS, *ODD_FILES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_bad_input_gets_a_sentence(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"FILE": mistake.file, "FLEET": FLEET, "PLAYED": PLAYED, "LIVE": LIVE}
    files["FILE.jsonl"] = mistake.file
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in ("EMPTY", "BENCHMARK"):
        (tmp_path / name).mkdir()
    (tmp_path / "BENCHMARK" / "dev.json").write_text(mistake.file)
    sqlite3.connect(tmp_path / "BASE").execute("CREATE TABLE t (a)").connection.close()
    places = (*files, "EMPTY", "OUT", "BASE", "BENCHMARK")
    words = [
        str(tmp_path / word) if word in places else word.replace("LONG", "x" * 5000)
        for word in mistake.words.split()
    ]
    try:
        code = serve.main(words[1:]) if words[0] == "SERVE" else cli.main(words)
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    assert said.endswith(".\n")
    assert "Traceback" not in said
    assert not said.startswith("usage:"), "the words are known; what they say is wrong"
