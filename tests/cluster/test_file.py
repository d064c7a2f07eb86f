from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.cluster import ClusterSpec, EngineEntry, RouterEntry, load
from hexgen_vllm.errors import ConfigError


def read(tmp_path: Path, text: str) -> ClusterSpec:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load(path)


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence.replace(str(tmp_path / "cluster.yaml"), "cluster.yaml")


def test_a_whole_file_becomes_values(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        """
defaults:
  model: m
  env: {A: 1, B: two}
  args: {max-num-seqs: 8, enforce_eager: true}
engines:
  - name: fast
    device: 0
  - name: slow
    device: "2,3"
    env: {B: 2}
    args: {max_num_seqs: 4}
    hexgen: {default-deadline-s: 30}
  - {name: there, url: "http://10.0.0.7:8000"}
  - {name: own, command: [serve-it, --port, "{port}"], port: 9000}
router: {port: 8080, policy: paper, alpha: 0.5}
restart: true
log_dir: logs
""",
    )
    assert spec == ClusterSpec(
        engines=(
            EngineEntry(
                name="fast",
                model="m",
                device="0",
                env={"A": "1", "B": "two"},
                args=("--max-num-seqs=8", "--enforce-eager"),
            ),
            EngineEntry(
                name="slow",
                model="m",
                device="2,3",
                env={"A": "1", "B": "2"},
                args=("--max-num-seqs=4", "--enforce-eager"),
                hexgen={"default_deadline_s": 30},
            ),
            EngineEntry(name="there", url="http://10.0.0.7:8000"),
            EngineEntry(
                name="own",
                command=("serve-it", "--port", "{port}"),
                port=9000,
                env={"A": "1", "B": "two"},
            ),
        ),
        router=RouterEntry(port=8080, policy="paper", options={"alpha": 0.5}),
        restart=True,
        log_dir="logs",
    )


def test_a_short_file_gets_a_router_on_a_free_port(tmp_path: Path) -> None:
    spec = read(tmp_path, "engines: [{name: a, model: m}]")
    assert spec.router == RouterEntry()
    assert spec.router.port == 0
    assert not spec.restart


def test_the_router_can_be_switched_off(tmp_path: Path) -> None:
    assert read(tmp_path, "engines: [{name: a, model: m}]\nrouter: false").router is None


def test_a_list_of_arguments_comes_after_the_default_mapping(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        "defaults: {args: {seed: 1}}\nengines: [{name: a, model: m, args: [--seed, 2]}]",
    )
    assert spec.engines[0].args == ("--seed=1", "--seed", "2")


def test_default_scheduler_options_do_not_reach_an_engine_with_another_scheduler(
    tmp_path: Path,
) -> None:
    spec = read(
        tmp_path,
        "defaults: {model: m, hexgen: {order: edf}}\n"
        "engines: [{name: a}, {name: b, scheduler: fcfs}]",
    )
    assert [dict(engine.hexgen) for engine in spec.engines] == [{"order": "edf"}, {}]


def test_a_number_may_be_written_as_other_programs_write_it(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        "engines: [{name: a, model: m, port: 8e3, hexgen: {displace-slack-s: 1e-1}}]\n"
        "stop_grace_s: 2e1\n",
    )
    (engine,) = spec.engines
    assert (engine.port, engine.hexgen, spec.stop_grace_s) == (
        8000, {"displace_slack_s": 0.1}, 20.0,
    )  # fmt: skip


ENGINE = "engines:\n  - name: a\n    model: m\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cluster.yaml line 1: must be a mapping."),
        ("a: [", "cluster.yaml line 1: not YAML, "),
        ("a: 1\nb: 2026-99-99", "cluster.yaml line 2: not YAML, month must be in 1..12."),
        ("[" * 20_000, "cluster.yaml is not YAML: it is nested too deeply, or within itself."),
        ("&a [*a]", "cluster.yaml is not YAML: it is nested too deeply, or within itself."),
        ("router: {}", "cluster.yaml line 1: engines: must be a list of at least one engine."),
        ("engines: []", "cluster.yaml line 1: engines: must be a list of at least one engine."),
        (ENGINE + "rooter: {}", "cluster.yaml line 4: unknown key 'rooter'; known are defaults, "),
        (
            "enginess: []",
            "cluster.yaml line 1: unknown key 'enginess'; known are ",
        ),
        (ENGINE + "    prt: 1", "line 4: engines[0]: unknown engine key 'prt'; known are "),
        (ENGINE + "    port: 70000", "line 4: engines[0]: port must be at most 65535, not 70000."),
        (ENGINE + "    port: x", "line 4: engines[0]: port must be a number, not 'x'."),
        (ENGINE + "    name: b", "line 4: engines[0].name is there twice."),
        (ENGINE + "    scheduler: lifo", "line 4: engines[0]: scheduler must be one of "),
        (ENGINE + "    args: 3", "line 4: engines[0]: args must be a list of words or a mapping."),
        (ENGINE + "    args: [[1]]", "line 4: engines[0]: args must be a list of words or"),
        (ENGINE + "    args: {port: 1}", "line 4: engines[0]: args must not set port; "),
        (ENGINE + "    args: [--host=x]", "line 4: engines[0]: args must not set host; "),
        (ENGINE + "    env: {A: [1]}", "line 4: engines[0]: env must be a mapping of names"),
        (ENGINE + "    device: [1]", "line 4: engines[0]: device must be a number or text"),
        (ENGINE + "    command: x", "line 4: engines[0]: command must be a list of words."),
        (
            ENGINE + "    hexgen: {ordr: x}",
            "line 4: engines[0].hexgen: unknown hexgen option 'ordr'",
        ),
        (ENGINE + "    hexgen:\n      pace: true\n      ordr: x", "line 6: engines[0].hexgen: "),
        (ENGINE + "    hexgen: {max-displacements: x}", "max-displacements must be a number, not"),
        (ENGINE + "    hexgen: [1]", "line 4: engines[0].hexgen: must be a mapping."),
        (ENGINE + "    port: null", "line 4: engines[0]: port must be a number, not None."),
        (ENGINE + "    host: 2026-01-01", "line 4: engines[0]: host must be text, not "),
        (ENGINE + "    prot: 1", "(did you mean 'port'?)."),
        (ENGINE + "rays: {}", "(did you mean 'ray'?)."),
        (ENGINE + "ray: {least: 1}", "line 4: ray: unknown ray key 'least'"),
        (ENGINE + "    url: http://x", "line 2: engines[0]: model does not go with url."),
        (ENGINE + "    url: x", "line 2: engines[0]: url must be like http://host:port, not 'x'."),
        (ENGINE + "    command: [x]", "line 2: engines[0]: model does not go with command."),
        (
            ENGINE + "    scheduler: fcfs\n    hexgen: {order: edf}",
            "line 2: engines[0]: hexgen opt",
        ),
        (ENGINE + "  - 3", "line 4: engines[1]: must be a mapping."),
        (ENGINE + "  - name: a b", "line 4: engines[1]: name must be 1 to 64 letters"),
        (ENGINE + "  - name: b", "line 4: engines[1]: model, url or command is missing."),
        (ENGINE + "  - {name: a, model: m}", "line 1: engines must have different names, but two"),
        (ENGINE + "restart: 1", "line 4: restart must be true or false, not 1."),
        (ENGINE + "stop_grace_s: -1", "line 4: stop_grace_s must be at least 0, not -1."),
        (ENGINE + "router: [x]", "line 4: router: must be a mapping."),
        (ENGINE + "router:\n  port: x", "line 5: router: port must be a number, not 'x'."),
        (ENGINE + "router: {policy: best}", "line 4: router: policy must be one of "),
        (ENGINE + "router:\n  alpa: 1", "line 5: router: unknown router option 'alpa'; known are"),
        (ENGINE + "router:\n  alpha: 2", "line 5: router: alpha must be at most 1, not 2."),
        (ENGINE + "router:\n  worker-urls: []", "line 5: router: worker_urls does not belong"),
        ("defaults: {prt: 1}\n" + ENGINE, "line 1: defaults: unknown engine key 'prt'; known are"),
    ],
)
def test_an_error_is_one_sentence_with_file_line_and_place(
    tmp_path: Path, text: str, sentence: str
) -> None:
    assert sentence in complaint(tmp_path, text)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"none\.yaml cannot be read: No such file or directory\."
    ):
        load(tmp_path / "none.yaml")
