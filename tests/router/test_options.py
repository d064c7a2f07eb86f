"""Options and command line: names, bounds, and one sentence for what is wrong."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from hexgen_vllm import option
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.main import add_arguments, options_from, run
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.tune.online import OnlineOptions

A, B = "http://10.0.0.1:8000", "https://b.example/base"


def test_workers_get_names() -> None:
    options = RouterOptions(worker_urls=(A + "/", f"fast={B}"))
    assert options.workers() == (Worker("engine-0", A), Worker("fast", B))


@pytest.mark.parametrize(
    "urls",
    [
        ("10.0.0.1:8000",),
        ("ftp://a",),
        ("http://",),
        ("http://a:99999",),
        ("http://a?x=1",),
        ("http://[a",),
        ("a b=http://a",),
        (A, A),
        (f"x={A}", f"x={B}"),
        (f"engine-1={A}", B),
    ],
)
def test_wrong_workers_are_refused(urls: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="worker_urls"):
        RouterOptions(worker_urls=urls)


def test_flags_of_the_ecosystem_are_understood() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = f"""--worker-urls {A} {B} --policy paper --alpha 0.5 --host 0.0.0.0 --port 0
        --request-timeout-secs 9 --health-check-interval-secs 1 --health-check-timeout-secs 2
        --health-failure-threshold 4 --health-success-threshold 5 --health-check-endpoint /ping
        --retry-max-retries 7 --retry-initial-backoff-ms 8 --retry-max-backoff-ms 90
        --retry-backoff-multiplier 2 --retry-jitter-factor 0.1 --disable-retries
        --max-concurrent-requests 11 --queue-size 12 --queue-timeout-secs 13
        --cb-failure-threshold 2 --cb-success-threshold 4 --cb-timeout-duration-secs 30
        --cb-window-duration-secs 90 --disable-circuit-breaker --cors-allowed-origins https://a
        --prometheus-host 0.0.0.0 --prometheus-port 29000
        --api-key k1 k2 --request-id-headers x-a x-b"""
    args = parser.parse_args(line.split())
    options = option.from_mapping(RouterOptions, option.given(args, RouterOptions))
    assert options.worker_urls == (A, B)
    assert options.request_id_headers == ("x-a", "x-b")
    assert options.disable_retries
    assert (options.retry_max_retries, options.retry_jitter_factor) == (7, 0.1)
    assert (options.max_concurrent_requests, options.queue_timeout_secs) == (11, 13.0)
    assert (options.cb_failure_threshold, options.cb_success_threshold) == (2, 4)
    assert (options.cb_timeout_duration_secs, options.cb_window_duration_secs) == (30.0, 90.0)
    assert (options.disable_circuit_breaker, options.allowed_origins) == (True, ("https://a",))


def test_the_queue_has_bounds_under_either_name() -> None:
    options = RouterOptions(queue_size=5, queue_timeout_secs=6.0)
    found = options.bounded(DispatchOptions())
    assert (found.max_held_calls, found.held_timeout_s) == (5, 6.0)
    given = DispatchOptions(max_held_calls=7, held_timeout_s=8.0)
    assert options.bounded(given) == given


def parsed(line: str) -> tuple[RouterOptions, DispatchOptions]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(line.split()), {})


@pytest.mark.parametrize(
    ("alias", "name"),
    [("max_held_calls", "queue_size"), ("held_timeout_s", "queue_timeout_secs")],
)
def test_an_alias_is_the_option_itself_wherever_it_is_given(
    tmp_path: Path, alias: str, name: str
) -> None:
    flag, main = (f"--{word.replace('_', '-')}" for word in (alias, name))
    for line in (f"{flag} 7", f"{main} 9 {flag} 7"):
        options, dispatch = parsed(f"--worker-urls {A} {line}")
        assert getattr(options, name) == 7
        assert getattr(options.bounded(dispatch), alias) == 7
    file = tmp_path / "router.yaml"
    file.write_text(f"{alias}: 7\n")
    assert getattr(parsed(f"--config {file}")[0], name) == 7
    # What the command line says goes before the file, by whatever name.
    options, dispatch = parsed(f"--config {file} {main} 9")
    assert getattr(options.bounded(dispatch), alias) == 9
    for second in (name, name.replace("_", "-"), alias.replace("_", "-")):
        file.write_text(f"{alias}: 7\n{second}: 7\n")
        with pytest.raises(ConfigError, match=r"line 2: .* are names of one option"):
            parsed(f"--config {file}")
    with pytest.raises(ConfigError, match="names of one option"):
        option.from_mapping(RouterOptions, {alias: 7, name: 9})


def test_the_help_shows_the_defaults_that_are_in_force() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options, dispatch = parsed(f"--worker-urls {A}")
    in_force = {**vars(options.bounded(dispatch)), **vars(options)}
    shown = re.compile(r"\(default: (.*)\)$")
    seen = 0
    for action in parser._actions:
        said = shown.search(action.help or "")
        if said is None:
            continue
        names = [flag[2:].replace("-", "_") for flag in action.option_strings]
        for value in (in_force[name] for name in names if name in in_force):
            words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert said[1] == (words.lower() if isinstance(value, bool) else words), names
            seen += 1
    assert seen > 50


def test_options_inherit_from_nothing_and_tuning_gets_its_own() -> None:
    assert RouterOptions.__bases__ == (object,)
    tuning = RouterOptions(tune="auto", tune_workflows=40).tuning
    assert tuning == OnlineOptions(tune="auto", tune_workflows=40)
    assert RouterOptions().tuning == OnlineOptions()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("--worker-urls a --polcy slack", "--policy"),
        ("--worker-urls a --queue-sise=4", "--queue-size"),
        ("--queue-siz 4 --nonsense", None),  # the beginning of a flag is the flag
        ("--worker-urls a --xyzzy 1", None),
    ],
)
def test_a_misspelt_flag_is_guessed(
    line: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(line.split())
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (f"did you mean {meant}" in error) if meant else ("did you mean" not in error)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("alpa", "alpha"),
        ("queue-sise", "queue_size"),
        ("Policy", "policy"),
        ("worker-url", "worker_urls"),
    ],
)
def test_a_misspelt_key_is_guessed_among_all_options(tmp_path: Path, key: str, meant: str) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(f"{key}: 1\n")
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'") as raised:
        parsed(f"--config {file}")
    assert len(str(raised.value).split("known are")[1]) < 100  # not all of them


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "worker_urls"),
        ("--worker-urls nonsense", "worker_urls"),
        (f"--worker-urls {A} --port 99999", "port"),
        (f"--worker-urls {A} --queue-timeout-secs nan", "queue_timeout_secs"),
        (f"--worker-urls {A} --policy nonsense", "policy"),
        (f"--worker-urls {A} --alpha 2", "alpha"),
        (f"--worker-urls {A} --nonsense", "nonsense"),
        (f"--worker-urls {A} --ssl-certfile /nowhere", "ssl_certfile"),
        (f"--worker-urls {A} --ssl-certfile {__file__}", "ssl_certfile"),
        (f"--worker-urls {A} --engine-ssl-ca-certs {__file__}", "engine_ssl_ca_certs"),
        (f"--worker-urls {A} --worker-allowed-hosts a:80", "worker_allowed_hosts"),
        (f"--worker-urls {A} --tenant-weights a", "tenant_weights"),
        ("--config /nowhere", "/nowhere cannot be read"),
        (f"--worker-urls {A} --host 203.0.113.9 --port 0", "cannot listen"),
    ],
)
def test_a_bad_option_is_one_sentence(
    line: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run(line.split())
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert word in error
    assert error.endswith(".\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "meant"),
    [("policy: slak", "slack"), ("overload: protct", "protect"), ("log-format: jsn", "json")],
)
def test_a_misspelt_word_for_a_choice_is_guessed(tmp_path: Path, line: str, meant: str) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=rf"did you mean '{meant}'"):
        parsed(f"--config {file}")
